// Several new tokens of each request attend to its K and V: prompts and chunks of them, in one call, in bfloat16.
//
// A task is some rows of a request, for all query heads that share a KV head: what it needs of K and V is brought into
// the order of the processor's dot product of pairs once for all of them, a block of keys at a time, and then a tile of
// rows after the other goes through two matrix products of ours with an online softmax in between (FlashAttention: Dao
// et al., arXiv 2205.14135). Products of bfloat16 are summed in float32, scores stay float32, and only the weights of V
// are rounded to bfloat16.
//
// No task sees keys behind its last row; nothing is read at or past a request's length. Threads take tasks one by one,
// the longest first, and a task's result depends on nobody else.
//
// Needs a processor with AVX512-BF16, see pairs.h.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "pairs.h"

// Everything about a call. Strides are in numbers, and a head's own numbers are contiguous.
struct Call {
    int64_t segments, q_heads, kv_heads, k_width, v_width, window, threads;
    const uint16_t *k, *v, *q;
    uint16_t* out;
    int64_t k_slot, k_token, k_head, v_slot, v_token, v_head, q_row, q_head, out_row, out_head;
    const int64_t *slots, *rows, *counts, *lengths;  // of each segment: its first row, how many, and all its tokens
    const float* sinks;                              // of each query head, or null
    char* scratch;
    float scale, softcap;  // softcap 0: none
};

#if WORKS
namespace {

constexpr int KEYS = 256;  // of a block
constexpr int TILE = 6;    // rows of a product computed together, 4 vectors wide: sums fill the registers
constexpr int ROWS = 384;  // of a task, over the heads of a group: many, as each brings K and V into order again
constexpr float LOG2_E = 1.44269504f;
const f32 LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t group(const Call& c) { return c.q_heads / c.kv_heads; }
inline int64_t rows_of_task(const Call& c) { return std::clamp<int64_t>(ROWS / group(c), 8, 128); }
inline int64_t parts(const Call& c, int64_t segment) {
    return (c.counts[segment] + rows_of_task(c) - 1) / rows_of_task(c);
}

// What a thread works in. `pairs` are two neighbouring numbers, which the processor multiplies and sums at once. What is
// between the two products is of TILE rows.
struct Room {
    int64_t rows, k_pairs, v_columns;
    uint32_t *query, *k, *v, *weights;  // [rows][k_pairs], [k_pairs][KEYS], [KEYS / 2][v_columns], [TILE][KEYS / 2]
    float *scores, *fade;               // [TILE][KEYS], [TILE]
    float *out, *top, *total;           // [rows][v_columns], [rows] and whole vectors each
    char* end;
    Room(char* at, const Call& c)
        : rows(rows_of_task(c) * group(c)), k_pairs((c.k_width + 1) / 2), v_columns(up(c.v_width, 16)) {
        const auto take = [&](auto*& mine, int64_t numbers) {
            mine = reinterpret_cast<std::remove_reference_t<decltype(mine)>>(at);
            at += up(numbers * 4, 64);
        };
        take(query, rows * k_pairs);
        take(k, k_pairs * KEYS);
        take(v, KEYS / 2 * v_columns);
        take(weights, TILE * KEYS / 2);
        take(scores, TILE * KEYS);
        take(fade, 16);
        take(out, rows * v_columns);
        take(top, rows + 16);
        take(total, rows + 16);
        end = at;
    }
};

INLINE __m512i load_some(const uint16_t* p, int64_t n) {  // of 32 numbers the first n, and zeros
    return _mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1, p);
}

// 16 x 16 numbers of 32 bits, rows to columns.
INLINE void transpose(__m512i* x) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            y[8 * j + i] = _mm512_shuffle_i32x4(x[8 * j + i], x[8 * j + i + 4], 0x88);
            y[8 * j + i + 4] = _mm512_shuffle_i32x4(x[8 * j + i], x[8 * j + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

// n keys as columns of pairs; columns up to the next multiple of 16 are zeros.
void pack_keys(const uint16_t* k, int64_t token, int64_t width, int n, uint32_t* to) {
    for (int first = 0; first < n; first += 16)
        for (int64_t d = 0; d < width; d += 32) {
            __m512i x[16];
            for (int i = 0; i < 16; i++)
                x[i] = first + i < n ? load_some(k + (first + i) * token + d, width - d) : _mm512_setzero_si512();
            transpose(x);
            const int64_t pairs = std::min<int64_t>(16, (width - d + 1) / 2);
            for (int64_t i = 0; i < pairs; i++) _mm512_storeu_si512(to + (d / 2 + i) * KEYS + first, x[i]);
        }
}

// n rows of V, two by two, as pairs; a row too few is zeros.
void pack_values(const uint16_t* v, int64_t token, int64_t width, int n, int64_t columns, uint32_t* to) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 16; i++) {
        low[2 * i] = i, low[2 * i + 1] = 32 + i;
        high[2 * i] = 16 + i, high[2 * i + 1] = 48 + i;
    }
    const __m512i lower = _mm512_load_si512(low), upper = _mm512_load_si512(high);
    for (int i = 0; i < n; i += 2)
        for (int64_t d = 0; d < columns; d += 32) {
            const __m512i a = load_some(v + i * token + d, width - d);
            const __m512i b = i + 1 < n ? load_some(v + (i + 1) * token + d, width - d) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + i / 2 * columns + d, _mm512_permutex2var_epi16(a, lower, b));
            if (d + 16 < columns)
                _mm512_storeu_si512(to + i / 2 * columns + d + 16, _mm512_permutex2var_epi16(a, upper, b));
        }
}

// M rows and 16 V columns of a product of pairs: c = c * fade + a b, or a b alone where `fade` is null.
template <int M, int V>
INLINE void tile(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t pairs, float* c,
                 int64_t c_row, const float* fade) {
    __m512 sums[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++)
            sums[m][v] = fade ? _mm512_loadu_ps(c + m * c_row + 16 * v) * _mm512_set1_ps(fade[m]) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh row[V];
        for (int v = 0; v < V; v++) row[v] = (__m512bh)_mm512_loadu_si512(b + p * b_row + 16 * v);
        for (int m = 0; m < M; m++) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(a[m * a_row + p]);
            for (int v = 0; v < V; v++) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], x, row[v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(c + m * c_row + 16 * v, sums[m][v]);
}

// At most TILE rows.
template <int V>
void strip(int rows, const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t pairs, float* c,
           int64_t c_row, const float* fade) {
    if (rows == TILE) return tile<TILE, V>(a, a_row, b, b_row, pairs, c, c_row, fade);
    for (int m = 0; m < rows; m++)
        tile<1, V>(a + m * a_row, a_row, b, b_row, pairs, c + m * c_row, c_row, fade ? fade + m : nullptr);
}

void multiply(int rows, int64_t columns, const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row,
              int64_t pairs, float* c, int64_t c_row, const float* fade) {
    for (int64_t n = 0; n < columns; n += 64) switch ((std::min<int64_t>(64, columns - n) + 15) / 16) {
        case 1: strip<1>(rows, a, a_row, b + n, b_row, pairs, c + n, c_row, fade); break;
        case 2: strip<2>(rows, a, a_row, b + n, b_row, pairs, c + n, c_row, fade); break;
        case 3: strip<3>(rows, a, a_row, b + n, b_row, pairs, c + n, c_row, fade); break;
        default: strip<4>(rows, a, a_row, b + n, b_row, pairs, c + n, c_row, fade);
    }
}

// Which keys of a block the rows of a tile see: row i those in [from[i], to[i]).
struct Seen {
    int rows, from[TILE], to[TILE];
    bool all(int keys) const {
        for (int i = 0; i < rows; i++)
            if (from[i] > 0 || to[i] < keys) return false;
        return true;
    }
};

// Lane i is all of x[i], folded by `op`.
template <class Op>
INLINE f32 folded_tile(const f32 (&x)[8], Op op) {
    f32 quarters[4];
    for (int i = 0; i < 4; i++) quarters[i] = folded_to_quarters(x[i], x[i + 4], x[i], x[i + 4], op);
    return folded(quarters, op);
}

// Scores of n keys become weights, 0 for those that a row does not see. `top` and `total` are each row's maximum, times
// log2(e), and its sum of weights so far; `fade` is what earlier weights are worth now.
INLINE void soften(const Call& c, float* scores, int n, const Seen& seen, uint32_t* weights, float* top, float* total,
                   float* fade) {
    static_assert(TILE <= 8);
    const int vectors = (n + 15) / 16;
    const bool plain = c.softcap == 0 && c.scale > 0 && seen.all(16 * vectors);
    f32 x, tops[8], sums[8] = {}, before, so_far;
    for (int i = 0; i < 8; i++) tops[i] = all(MINUS);
    for (int i = 0; i < seen.rows; i++)
        for (int v = 0; v < vectors; v++) {
            float* at = scores + i * KEYS + 16 * v;
            std::memcpy(&x, at, sizeof x);
            if (!plain) {
                x *= c.scale;
                if (c.softcap) x = c.softcap * tangent(x / c.softcap);
                const f32 place = LANES + float(16 * v);
                x = (place >= float(seen.from[i])) & (place < float(seen.to[i])) ? x : all(MINUS);
                std::memcpy(at, &x, sizeof x);
            }
            tops[i] = larger(tops[i], x);
        }
    const float factor = plain ? c.scale * LOG2_E : LOG2_E;
    std::memcpy(&before, top, sizeof before);
    std::memcpy(&so_far, total, sizeof so_far);
    const f32 now = larger(before, folded_tile(tops, [](f32 a, f32 b) { return larger(a, b); }) * factor);
    const f32 shift = now == MINUS ? f32{} : now;  // of a row that has seen nothing yet
    const f32 faded = power_of_two(before - shift);
    for (int i = 0; i < seen.rows; i++)
        for (int v = 0; v < vectors; v++) {
            std::memcpy(&x, scores + i * KEYS + 16 * v, sizeof x);
            x = power_of_two(x * factor - shift[i]);
            sums[i] += x;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i * KEYS / 2 + 8 * v),
                                (__m256i)_mm512_cvtneps_pbh((__m512)x));
        }
    const auto put = [&](float* at, f32 x) { _mm512_mask_storeu_ps(at, (1u << seen.rows) - 1, (__m512)x); };
    put(top, now);
    put(total, so_far * faded + folded_tile(sums, plus));
    put(fade, faded);
}

// Rows [first, first + rows) of a segment, for the query heads of one KV head.
void task(const Call& c, int64_t segment, int64_t head, int64_t first, int64_t rows, const Room& room) {
    const int64_t heads = group(c), count = rows * heads;
    const int64_t cached = c.lengths[segment] - c.counts[segment];
    const int64_t end = cached + first + rows;  // what the last row sees ends here
    const int64_t begin = c.window ? std::max<int64_t>(0, cached + first + 1 - c.window) : 0;
    const uint16_t* k = c.k + c.slots[segment] * c.k_slot + head * c.k_head;
    const uint16_t* v = c.v + c.slots[segment] * c.v_slot + head * c.v_head;
    const int64_t row0 = c.rows[segment] + first, head0 = head * heads;

    for (int64_t i = 0; i < count; i++) {
        const uint16_t* q = c.q + (row0 + i / heads) * c.q_row + (head0 + i % heads) * c.q_head;
        for (int64_t d = 0; d < c.k_width; d += 32) {
            const int64_t pairs = std::min<int64_t>(16, (c.k_width - d + 1) / 2);
            _mm512_mask_storeu_epi32(room.query + i * room.k_pairs + d / 2, (1u << pairs) - 1,
                                     load_some(q + d, c.k_width - d));
        }
        room.top[i] = c.sinks ? c.sinks[head0 + i % heads] * LOG2_E : MINUS;
        room.total[i] = c.sinks ? 1 : 0;
    }
    std::memset(room.out, 0, count * room.v_columns * sizeof(float));

    for (int64_t at = begin; at < end; at += KEYS) {
        const int n = int(std::min<int64_t>(KEYS, end - at));
        pack_keys(k + at * c.k_token, c.k_token, c.k_width, n, room.k);
        pack_values(v + at * c.v_token, c.v_token, c.v_width, n, room.v_columns, room.v);
        // A tile from its scores to its sums, so that what is between them stays in the first level cache.
        for (int64_t m = 0; m < count; m += TILE) {
            Seen seen{int(std::min<int64_t>(TILE, count - m))};
            const auto within = [&](int64_t key) { return int(std::clamp<int64_t>(key - at, 0, n)); };
            for (int i = 0; i < seen.rows; i++) {
                const int64_t last = cached + first + (m + i) / heads + 1;
                seen.from[i] = c.window ? within(last - c.window) : 0;
                seen.to[i] = within(last);
            }
            const int keys = seen.to[seen.rows - 1];
            if (!keys) continue;
            multiply(seen.rows, up(keys, 16), room.query + m * room.k_pairs, room.k_pairs, room.k, KEYS, room.k_pairs,
                     room.scores, KEYS, nullptr);
            soften(c, room.scores, keys, seen, room.weights, room.top + m, room.total + m, room.fade);
            multiply(seen.rows, room.v_columns, room.weights, KEYS / 2, room.v, room.v_columns, (keys + 1) / 2,
                     room.out + m * room.v_columns, room.v_columns, room.fade);
        }
    }

    for (int64_t i = 0; i < count; i++) {
        uint16_t* out = c.out + (row0 + i / heads) * c.out_row + (head0 + i % heads) * c.out_head;
        const __m512 scale = _mm512_set1_ps(1 / room.total[i]);
        for (int64_t d = 0; d < c.v_width; d += 16) {
            const __m512 x = _mm512_loadu_ps(room.out + i * room.v_columns + d) * scale;
            const int64_t left = c.v_width - d;
            _mm256_mask_storeu_epi16(out + d, left >= 16 ? 0xffff : (1u << left) - 1, (__m256i)_mm512_cvtneps_pbh(x));
        }
    }
}

}  // namespace

extern "C" {

// Bytes that `scratch` must have; it begins at a multiple of 64.
int64_t vattention_prefill_scratch(const Call* call) { return call->threads * (Room(nullptr, *call).end - (char*)nullptr); }

void vattention_prefill(const Call* call) {
    const Call& c = *call;
    int64_t tasks = 0, work = 0;
    for (int64_t s = 0; s < c.segments; s++) {
        tasks += parts(c, s) * c.kv_heads;
        work += c.counts[s] * c.lengths[s] * c.q_heads;
    }
    const int64_t room_bytes = vattention_prefill_scratch(call) / c.threads;
    [[maybe_unused]] const int threads = int(work < 1 << 12 ? 1 : std::min(c.threads, tasks));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t number = 0; number < tasks; number++) {
#if defined(_OPENMP)
        const Room room(c.scratch + omp_get_thread_num() * room_bytes, c);
#else
        const Room room(c.scratch, c);
#endif
        int64_t segment = 0, index = number;
        for (; index >= parts(c, segment) * c.kv_heads; segment++) index -= parts(c, segment) * c.kv_heads;
        const int64_t part = parts(c, segment) - 1 - index / c.kv_heads;  // later rows see more
        const int64_t first = part * rows_of_task(c);
        task(c, segment, index % c.kv_heads, first, std::min(rows_of_task(c), c.counts[segment] - first), room);
    }
}
}
#endif
