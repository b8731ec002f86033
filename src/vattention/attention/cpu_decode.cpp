// One new token of each request attends to its K and V: all requests of a batch, of any lengths, in one call.
//
// Each K and V byte is read once from memory for all query heads of its group, where it lies: K and V may have any
// strides as long as a head's numbers are contiguous. A KV head of a request is cut into chunks, of at most CHUNK
// tokens. A chunk is a task: all scores, then their softmax, then V. It leaves a maximum, a sum and weighted V behind,
// and the chunks of a request are put together in their order (Flash-Decoding, Dao et al. 2023). Where chunks end
// depends on the request alone, so its result does not depend on what else is in the batch, nor on the number of
// threads. Each thread does the tasks of one range in the order in which memory has them, then helps with the ranges of
// others: what a processor reads ahead by itself is then of use.
//
// Everything is computed in float32, whatever the numbers are stored as; where the processor sums products of bfloat16
// in float32 by itself, it does, with the weights of V rounded to bfloat16. Nothing is read at or past a request's
// length, nor a token that a mask leaves out.
// The loops are written with the vector extensions of GCC and clang, 16 floats at a time, which the compiler splits for
// machines with narrower registers.
//
// Compiled with NUMBERS, what K, V, the query and the output are stored as (float, bf16 or f16), and WIDTH, that of K
// and of V (a multiple of 32), or 0 for any: to know it makes the loops a third faster. WHERE is Slots unless defined.
//
// Where the tokens of a request lie is asked of one class, WHERE: `Slots` or `Blocks`. Nothing else knows about
// addresses.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "numbers.h"
#include "vectors.h"

namespace {

#if !defined(WHERE)
#define WHERE Slots
#endif

using T = NUMBERS;
constexpr int W = WIDTH / UNIT;  // units of K and V where that is known

constexpr int CHUNK = 512;  // tokens of a task at most: long enough that memory is read in long runs
constexpr int AHEAD = W ? std::max<int>(16, 8192 / (W * UNIT * sizeof(T))) : 32;  // rows asked for early: two pages
constexpr int GROUP = 4;    // query heads at a time, as many as leave registers for their sums
constexpr int64_t SMALL = 1 << 16;  // numbers of K and V below which a second thread costs more than it saves

#if defined(__AVX512BF16__)
constexpr bool PAIRS = std::is_same<T, bf16>::value && W;  // products of pairs of bfloat16 are the processor's own
#else
constexpr bool PAIRS = false;
#endif

// Everything about a call. Strides are in numbers, and a head's own numbers are contiguous.
struct Call {
    int64_t requests, q_heads, kv_heads, k_width, v_width, window, threads;
    const char *k, *v, *q;
    char* out;
    int64_t k_slot, k_token, k_head, v_slot, v_token, v_head, q_row, q_head, out_row, out_head;
    const int64_t *slots, *rows, *lengths;  // of each request; rows are those of q and out
    const uint8_t* mask;                    // which tokens count, or null
    int64_t mask_row;
    const float* sinks;  // of each query head, or null
    float* scratch;
    float scale, softcap;  // softcap 0: none
    const int32_t* table;  // of `Blocks`: the block of each part of each slot; k_slot and v_slot are those of blocks
    int64_t table_row, block_size;
};

// K or V of one head: what a place adds to its address. A slot's, or a block's.
struct Side {
    const T* base;
    int64_t slot, token;
};

// Tokens of a request in a slot: the address of one is arithmetic.
struct Slots {
    const Call& call;
    // Writes where tokens [first, first + n) are.
    INLINE void find(const Side& side, int64_t request, int64_t first, int n, const T** at) const {
        const T* row = side.base + call.slots[request] * side.slot + first * side.token;
        for (int i = 0; i < n; i++, row += side.token) at[i] = row;
    }
};

// Tokens in blocks of a fixed number of them, anywhere: the address of one takes a look into a table.
struct Blocks {
    const Call& call;
    INLINE void find(const Side& side, int64_t request, int64_t first, int n, const T** at) const {
        const int32_t* block = call.table + call.slots[request] * call.table_row + first / call.block_size;
        int64_t place = first % call.block_size;
        for (int i = 0; i < n; block++, place = 0) {
            const int end = int(std::min<int64_t>(n, i + call.block_size - place));
            const T* row = side.base + *block * side.slot + place * side.token;
            for (; i < end; i++, row += side.token) at[i] = row;
        }
    }
};

inline int64_t units(int64_t width) { return (width + UNIT - 1) / UNIT; }
inline int64_t first_token(const Call& c, int64_t request) {
    return c.window ? std::max<int64_t>(0, c.lengths[request] - c.window) : 0;
}
inline int64_t chunks(const Call& c, int64_t request) {
    return (c.lengths[request] - first_token(c, request) + CHUNK - 1) / CHUNK;
}

// Tokens [first, first + n) are those of a chunk. All chunks of a request are as long as each other, in whole 16.
struct Chunk {
    int64_t first;
    int n;
    Chunk(const Call& c, int64_t request, int64_t number) {
        const int64_t begin = first_token(c, request), count = chunks(c, request);
        const int64_t each = ((c.lengths[request] - begin + count - 1) / count + 15) / 16 * 16;
        first = begin + number * each;
        n = int(std::min(each, c.lengths[request] - first));
    }
};

// Which chunk of which request and KV head.
struct Task {
    int64_t request, head, number;
};

// What a task leaves behind for each query head of its group: weighted V in units, then sums of weights, then maxima.
struct Sums {
    f32* weighted;
    float *total, *top;
    int64_t width;  // vectors of `weighted` a head
    Sums(float* at, const Call& c) : weighted(reinterpret_cast<f32*>(at)), width(2 * units(c.v_width)) {
        const int64_t group = c.q_heads / c.kv_heads;
        total = at + group * width * 16;
        top = total + group;
    }
    static int64_t floats(const Call& c) {
        const int64_t group = c.q_heads / c.kv_heads;
        return group * 2 * units(c.v_width) * 16 + (2 * group + 15) / 16 * 16;
    }
};

// The rows of a task in the order in which they are read: K of the tokens that count, V of them, and the first K of the
// task that comes after it. Those of K and of V are filled up to whole 16 with others that may be read.
struct Rows {
    int n, padded;
    int64_t width;  // of the wider ones
    const T* at[2 * CHUNK + AHEAD];

    template <class Where>
    Rows(const Call& c, const Where& where, const Task& task, const Task& next)
        : width(std::max(c.k_width, c.v_width)) {
        const Chunk own(c, task.request, task.number), soon(c, next.request, next.number);
        n = own.n;
        padded = (n + 15) / 16 * 16;
        where.find(keys(c, task.head), task.request, own.first, n, at);
        where.find(values(c, task.head), task.request, own.first, n, at + padded);
        if (c.mask) keep(c.mask + task.request * c.mask_row + own.first);
        if (!n) return;
        const T **k = at, **v = at + padded, **ahead = v + padded;
        for (int i = n; i < padded; i++) k[i] = k[n - 1], v[i] = v[n - 1];
        const int some = std::min(AHEAD, soon.n);
        where.find(keys(c, next.head), next.request, soon.first, some, ahead);
        for (int i = some; i < AHEAD; i++) ahead[i] = ahead[0];
    }
    static Side keys(const Call& c, int64_t head) {
        return {reinterpret_cast<const T*>(c.k) + head * c.k_head, c.k_slot, c.k_token};
    }
    static Side values(const Call& c, int64_t head) {
        return {reinterpret_cast<const T*>(c.v) + head * c.v_head, c.v_slot, c.v_token};
    }
    void keep(const uint8_t* counts) {
        int kept = 0;
        const T** v = at + padded;
        for (int i = 0; i < n; i++)
            if (counts[i]) at[kept] = at[i], v[kept++] = v[i];
        n = kept;
        padded = (n + 15) / 16 * 16;
        std::copy(v, v + n, at + padded);
    }
    // Asks for what will be read after AHEAD others: the processor's own guesses end with every page.
    INLINE void fetch(int i) const {
        const T* row = at[i + AHEAD];
        for (int64_t d = 0; d < (W ? W * UNIT : width); d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
    }
};

// Dot products of 16 rows of K with G queries, scaled already.
template <int G>
INLINE void score(const T* const* k, const f32* q, int64_t width, f32* scores, int64_t next) {
    const int64_t full = W ? W : width / UNIT, rest = W ? 0 : width % UNIT, stride = 2 * (W ? W : units(width));
    f32 quarters[G][4];
    for (int r = 0; r < 4; r++) {
        f32 acc[4][G] = {};
        for (int64_t u = 0; u < full; u++)
            for (int i = 0; i < 4; i++) {
                const Unit x = load(k[r + 4 * i] + u * UNIT);
                for (int g = 0; g < G; g++) {
                    acc[i][g] += x.a * q[g * stride + 2 * u];
                    acc[i][g] += x.b * q[g * stride + 2 * u + 1];
                }
            }
        if (rest)
            for (int i = 0; i < 4; i++) {
                const Unit x = load_some(k[r + 4 * i] + full * UNIT, int(rest));
                for (int g = 0; g < G; g++)
                    acc[i][g] += x.a * q[g * stride + 2 * full] + x.b * q[g * stride + 2 * full + 1];
            }
        for (int g = 0; g < G; g++)
            quarters[g][r] = folded_to_quarters(acc[0][g], acc[1][g], acc[2][g], acc[3][g], plus);
    }
    for (int g = 0; g < G; g++) scores[g * next] = folded(quarters[g], plus);
}

#if defined(__AVX512BF16__)
INLINE __m512bh load_pairs(const T* p) { return (__m512bh)_mm512_loadu_si512(p); }

// The same where PAIRS, scaled last.
template <int G>
INLINE void score_pairs(const T* const* k, const __m512bh (&q)[G][W ? W : 1], float scale, f32* scores,
                        int64_t next) {
    f32 quarters[G][4];
    for (int r = 0; r < 4; r++) {
        __m512 acc[4][G];
        for (int i = 0; i < 4; i++)
            for (int g = 0; g < G; g++) acc[i][g] = _mm512_setzero_ps();
        for (int u = 0; u < W; u++)
            for (int i = 0; i < 4; i++) {
                const __m512bh x = load_pairs(k[r + 4 * i] + u * UNIT);
                for (int g = 0; g < G; g++) acc[i][g] = _mm512_dpbf16_ps(acc[i][g], x, q[g][u]);
            }
        for (int g = 0; g < G; g++)
            quarters[g][r] =
                folded_to_quarters((f32)acc[0][g], (f32)acc[1][g], (f32)acc[2][g], (f32)acc[3][g], plus);
    }
    for (int g = 0; g < G; g++) scores[g * next] = folded(quarters[g], plus) * scale;
}
#endif

// Sums of the rows of V, U units of them (the last one of `rest` numbers, unless 0), by the weights of G heads.
template <int G, int U>
INLINE void weigh(const Rows& rows, int64_t from, int rest, const float* weights, f32* weighted, int64_t stride) {
    f32 acc[G][2 * U] = {};
    for (int i = 0; i < rows.n; i++) {
        const T* row = rows.at[rows.padded + i] + from;
        if (!from) rows.fetch(rows.padded + i);
        for (int u = 0; u < U; u++) {
            const Unit x = rest ? load_some(row + u * UNIT, rest) : load(row + u * UNIT);
            for (int g = 0; g < G; g++) {
                const float w = weights[g * CHUNK + i];
                acc[g][2 * u] += x.a * w;
                acc[g][2 * u + 1] += x.b * w;
            }
        }
    }
    for (int g = 0; g < G; g++)
        for (int u = 0; u < 2 * U; u++) weighted[g * stride + u] = acc[g][u];
}

#if defined(__AVX512BF16__)
// The same where PAIRS, two rows at a time: weights are rounded to bfloat16, as those of `exponentials` are.
template <int G, int U>
INLINE void weigh_pairs(const Rows& rows, int64_t from, const uint16_t* weights, f32* weighted, int64_t stride) {
    __m512 acc[G][2 * U];
    for (int g = 0; g < G; g++)
        for (int u = 0; u < 2 * U; u++) acc[g][u] = _mm512_setzero_ps();
    for (int i = rows.padded, end = i + rows.n; i < end; i += 2) {  // without a second one another has weight 0
        if (!from) rows.fetch(i), rows.fetch(i + 1);
        const T *one = rows.at[i] + from, *two = rows.at[i + 1] + from;
        __m512bh pair[G];
        for (int g = 0; g < G; g++) {
            int32_t both;
            std::memcpy(&both, weights + g * CHUNK + i - rows.padded, sizeof both);
            pair[g] = (__m512bh)_mm512_set1_epi32(both);
        }
        for (int u = 0; u < U; u++) {
            const __m512i x = _mm512_loadu_si512(one + u * UNIT), y = _mm512_loadu_si512(two + u * UNIT);
            const __m512bh even = (__m512bh)_mm512_mask_blend_epi16(0xaaaaaaaa, x, _mm512_slli_epi32(y, 16));
            const __m512bh odd = (__m512bh)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(x, 16), y);
            for (int g = 0; g < G; g++) {
                acc[g][2 * u] = _mm512_dpbf16_ps(acc[g][2 * u], even, pair[g]);
                acc[g][2 * u + 1] = _mm512_dpbf16_ps(acc[g][2 * u + 1], odd, pair[g]);
            }
        }
    }
    for (int g = 0; g < G; g++)
        for (int u = 0; u < 2 * U; u++) weighted[g * stride + u] = (f32)acc[g][u];
}

// e^(x - top) of some vectors of scores, rounded to bfloat16; returns the sums of what they were rounded to, by lanes.
INLINE f32 exponentials(const f32* scores, int vectors, float top, uint16_t* out) {
    f32 total = {};
    for (int i = 0; i < vectors; i++) {
        const __m256i bits = (__m256i)_mm512_cvtneps_pbh((__m512)exponential(scores[i] - top));
        std::memcpy(out + 16 * i, &bits, sizeof bits);
        total += (f32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    }
    return total;
}
#endif

// One task for G of the query heads of its group, the first of which is number `first` there; `query` is the first
// one's, and `packed` all of the group, scaled, unless PAIRS.
template <int G>
void attend(const Call& c, const Rows& rows, const T* query, const f32* packed, int64_t first, const Sums& sums) {
    f32 scores[G * CHUNK / 16];
    const int vectors = (rows.n + 15) / 16, wide = CHUNK / 16;
#if defined(__AVX512BF16__)
    if constexpr (PAIRS) {
        __m512bh q[G][W];
        for (int g = 0; g < G; g++)
            for (int u = 0; u < W; u++) q[g][u] = load_pairs(query + g * c.q_head + u * UNIT);
        for (int i = 0; i < vectors; i++) {
            for (int j = 16 * i; j < 16 * i + 16; j++) rows.fetch(j);
            score_pairs<G>(rows.at + 16 * i, q, c.scale, scores + i, wide);
        }
    } else
#endif
        for (int i = 0; i < vectors; i++) {
            for (int j = 16 * i; j < 16 * i + 16; j++) rows.fetch(j);
            score<G>(rows.at + 16 * i, packed + first * 2 * units(c.k_width), c.k_width, scores + i, wide);
        }
    [[maybe_unused]] uint16_t pairs[PAIRS ? G * CHUNK : 1];
    for (int g = 0; g < G; g++) {
        f32* s = scores + g * wide;
        if (c.softcap != 0)
            for (int i = 0; i < vectors; i++) s[i] = c.softcap * tangent(s[i] / c.softcap);
        for (int i = rows.n; i < 16 * vectors; i++) s[i / 16][i % 16] = MINUS;
        f32 top = s[0], total = {};
        for (int i = 1; i < vectors; i++) top = larger(top, s[i]);
        const float most = sums.top[first + g] = largest(top);
#if defined(__AVX512BF16__)
        if constexpr (PAIRS)
            total = exponentials(s, vectors, most, pairs + g * CHUNK);
        else
#endif
            for (int i = 0; i < vectors; i++) total += s[i] = exponential(s[i] - most);
        sums.total[first + g] = sum(total);
    }
    f32* weighted = sums.weighted + first * sums.width;
#if defined(__AVX512BF16__)
    if constexpr (PAIRS) {
        for (int64_t u = 0; u < W; u += 2)
            weigh_pairs<G, 2>(rows, u * UNIT, pairs, weighted + 2 * u, sums.width);
        return;
    }
#endif
    const int64_t full = W ? W : c.v_width / UNIT;
    const int rest = W ? 0 : int(c.v_width % UNIT);
    const float* weights = reinterpret_cast<const float*>(scores);
    int64_t u = 0;
    for (; u + 2 <= full; u += 2)
        weigh<G, 2>(rows, u * UNIT, 0, weights, weighted + 2 * u, sums.width);
    for (; u < full; u++)
        weigh<G, 1>(rows, u * UNIT, 0, weights, weighted + 2 * u, sums.width);
    if (rest) weigh<G, 1>(rows, u * UNIT, rest, weights, weighted + 2 * u, sums.width);
}

template <class Where>
void attend(const Call& c, const Where& where, const Task& task, const Task& next, f32* packed, const Sums& sums) {
    const Rows rows(c, where, task, next);
    const int64_t group = c.q_heads / c.kv_heads, wide = units(c.k_width);
    if (!rows.n) {
        std::fill(sums.weighted, sums.weighted + group * sums.width, f32{});
        std::fill(sums.total, sums.total + group, 0.f);
        std::fill(sums.top, sums.top + group, MINUS);
        return;
    }
    const T* query = reinterpret_cast<const T*>(c.q) + c.rows[task.request] * c.q_row + task.head * group * c.q_head;
    for (int64_t g = 0; !PAIRS && g < group; g++)
        for (int64_t u = 0; u < wide; u++) {
            const int64_t n = c.k_width - u * UNIT;
            const T* from = query + g * c.q_head + u * UNIT;
            const Unit x = n < UNIT ? load_some(from, int(n)) : load(from);
            packed[2 * (g * wide + u)] = x.a * c.scale;
            packed[2 * (g * wide + u) + 1] = x.b * c.scale;
        }
    for (int64_t g = 0; g < group;) {  // parts of about the same size, of at most GROUP heads
        const int64_t left = group - g, parts = (left + GROUP - 1) / GROUP, size = (left + parts - 1) / parts;
        switch (size) {
            case 1: attend<1>(c, rows, query + g * c.q_head, packed, g, sums); break;
            case 2: attend<2>(c, rows, query + g * c.q_head, packed, g, sums); break;
            case 3: attend<3>(c, rows, query + g * c.q_head, packed, g, sums); break;
            default: attend<4>(c, rows, query + g * c.q_head, packed, g, sums);
        }
        g += size;
    }
}

// The output of one request, from the sums of its tasks, which start at `first`.
void finish(const Call& c, int64_t request, float* first) {
    T* out = reinterpret_cast<T*>(c.out) + c.rows[request] * c.out_row;
    const int64_t count = chunks(c, request), group = c.q_heads / c.kv_heads, floats = Sums::floats(c);
    for (int64_t h = 0; h < c.q_heads; h++) {
        float* own = first + h / group * count * floats;
        const int64_t g = h % group;
        float top = c.sinks ? c.sinks[h] : MINUS, total = 0;
        for (int64_t i = 0; i < count; i++) top = std::max(top, Sums(own + i * floats, c).top[g]);
        if (c.sinks) total = exponential(all(c.sinks[h] - top))[0];
        f32* whole = Sums(own, c).weighted + g * 2 * units(c.v_width);
        for (int64_t i = 0; i < count; i++) {
            const Sums part(own + i * floats, c);
            const float share = part.top[g] == MINUS ? 0 : exponential(all(part.top[g] - top))[0];
            total += share * part.total[g];
            for (int64_t u = 0; u < part.width; u++) {
                const f32 x = part.weighted[g * part.width + u] * share;
                whole[u] = i ? whole[u] + x : x;
            }
        }
        const float scale = total > 0 ? 1 / total : 0;  // a request that may look nowhere: 0
        for (int64_t u = 0; u < units(c.v_width); u++)
            store_some(Unit{whole[2 * u] * scale, whole[2 * u + 1] * scale}, out + h * c.out_head + u * UNIT,
                       int(std::min<int64_t>(UNIT, c.v_width - u * UNIT)));
    }
}

// Tasks that one thread starts with, in order; whoever takes one moves `next`.
struct alignas(64) Range {
    int64_t next, end;
};

// Where everything is in `scratch`. Tasks are those of all requests, in order.
struct Room {
    int64_t tasks = 0, work = 0;  // work: numbers of K and V
    Range* ranges;                // of each thread
    int64_t *first, *left;        // of each request: its first task, and how many are not done yet
    float *packed, *sums;
    explicit Room(const Call& c) {
        ranges = reinterpret_cast<Range*>((reinterpret_cast<uintptr_t>(c.scratch) + 63) & ~uintptr_t(63));
        first = reinterpret_cast<int64_t*>(ranges + c.threads);
        left = first + (c.requests + 7) / 8 * 8;
        packed = reinterpret_cast<float*>(left + (c.requests + 7) / 8 * 8);
        sums = packed + c.threads * packed_floats(c);
        for (int64_t r = 0; r < c.requests; r++) {
            tasks += chunks(c, r) * c.kv_heads;
            work += (c.lengths[r] - first_token(c, r)) * c.kv_heads * (c.k_width + c.v_width);
        }
    }
    static int64_t packed_floats(const Call& c) { return c.q_heads / c.kv_heads * units(c.k_width) * UNIT; }
    int64_t bytes(const Call& c) const {
        return 64 + c.threads * sizeof(Range) + (c.requests + 7) / 8 * 8 * 16 +
               4 * (c.threads * packed_floats(c) + tasks * Sums::floats(c));
    }
    // In the order of memory: head after head where each has its tokens together, else chunk after chunk.
    Task task(const Call& c, int64_t number) const {
        const int64_t r = std::upper_bound(first, first + c.requests, number) - first - 1;
        const int64_t own = number - first[r], count = chunks(c, r);
        if (c.k_head > c.k_token) return {r, own / count, own % count};
        return {r, own % c.kv_heads, own / c.kv_heads};
    }
};

template <class Where>
void run(const Call& c, const Where& where) {
    const Room room(c);
    for (int64_t r = 0, task = 0; r < c.requests; r++) {
        room.first[r] = task;
        task += room.left[r] = chunks(c, r) * c.kv_heads;
    }
    const int64_t threads = room.work < SMALL ? 1 : std::min(c.threads, room.tasks);
    for (int64_t i = 0; i < threads; i++)
        room.ranges[i] = {room.tasks * i / threads, room.tasks * (i + 1) / threads};
#pragma omp parallel num_threads(int(threads))
    {
#if defined(_OPENMP)
        const int64_t me = omp_get_thread_num();
#else
        const int64_t me = 0;
#endif
        f32* packed = reinterpret_cast<f32*>(room.packed + me * Room::packed_floats(c));
        for (int64_t turn = 0; turn < threads; turn++) {
            Range& range = room.ranges[(me + turn) % threads];
            for (int64_t number; (number = __atomic_fetch_add(&range.next, 1, __ATOMIC_RELAXED)) < range.end;) {
                const Task task = room.task(c, number);
                const int64_t first = room.first[task.request], count = chunks(c, task.request);
                float* sums = room.sums + (first + task.head * count + task.number) * Sums::floats(c);
                attend(c, where, task, room.task(c, std::min(number + 1, room.tasks - 1)), packed, Sums(sums, c));
                // Whoever does the last task of a request puts it together: nobody waits for the others.
                if (__atomic_sub_fetch(&room.left[task.request], 1, __ATOMIC_ACQ_REL) == 0)
                    finish(c, task.request, room.sums + first * Sums::floats(c));
            }
        }
    }
}

}  // namespace

extern "C" {

// Bytes that `scratch` must have.
int64_t vattention_scratch(const Call* call) { return Room(*call).bytes(*call); }

void vattention_decode(const Call* call) { run(*call, WHERE{*call}); }
}
