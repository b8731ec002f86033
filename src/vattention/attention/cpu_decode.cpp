// One new token of each request attends to its K and V: all requests of a batch, of any lengths, in one call.
//
// Each K and V byte is read once for all query heads of its group, where it lies: K and V may have any strides as long
// as a head's numbers are contiguous. A request is cut into chunks of CHUNK tokens, which threads take one by one; a
// chunk keeps a running maximum, sum and weighted V (online softmax: Milakov and Gimelshein, arXiv 1805.02867), and a
// request of several chunks is put together in their order (Flash-Decoding, Dao et al. 2023). Where chunks end depends
// on the request alone, so its result does not depend on what else is in the batch, nor on the number of threads.
//
// Everything is computed in float32, whatever the numbers are stored as; where the processor sums products of bfloat16
// in float32 by itself, it does, with the weights of V rounded to bfloat16. Nothing is read at or past a request's
// length.
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
#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "vectors.h"

namespace {

#if !defined(WHERE)
#define WHERE Slots
#endif

constexpr int64_t CHUNK = 256;  // tokens of a task; enough that starting and ending one costs little
constexpr int GROUP = 4;        // query heads at a time, as many as leave registers for their sums
constexpr int UNIT = 32;        // numbers loaded at once; a head is padded to whole units, with zeros
constexpr int64_t SMALL = 1 << 16;  // numbers of K and V below which a second thread costs more than it saves

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

using T = NUMBERS;
constexpr int W = WIDTH / UNIT;  // units of K and V where that is known
constexpr int BLOCK = W && W * UNIT * sizeof(T) <= 128 ? 32 : 16;  // tokens of a head at a time: 4 KiB of K, measured

#if defined(__AVX512BF16__)
constexpr bool PAIRS = std::is_same<T, bf16>::value && W;  // products of pairs of bfloat16 are the processor's own
#else
constexpr bool PAIRS = false;
#endif

struct Unit { f32 a, b; };  // 32 numbers; of bf16 the even ones and the odd ones, else the first and the last 16

INLINE Unit load(const float* p) {
    Unit u;
    std::memcpy(&u.a, p, sizeof u.a);
    std::memcpy(&u.b, p + 16, sizeof u.b);
    return u;
}

INLINE Unit load(const bf16* p) {
    u32 x;
    std::memcpy(&x, p, sizeof x);
    return {reinterpret_cast<f32>(x << 16), reinterpret_cast<f32>(x & 0xffff0000u)};
}

INLINE Unit load(const f16* p) {
    Unit u;
#if defined(__AVX512F__)
    u.a = reinterpret_cast<f32>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    u.b = reinterpret_cast<f32>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16))));
#elif defined(__F16C__)
    float x[UNIT];
    for (int i = 0; i < UNIT; i += 8)
        _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
    std::memcpy(&u, x, sizeof u);
#else
    // Shifted into place, a half is a float with an exponent 112 too small; subnormal ones come out right as well.
    float x[UNIT];
    for (int i = 0; i < UNIT; i++) {
        uint32_t bits = uint32_t(p[i].bits & 0x7fff) << 13;
        float y;
        std::memcpy(&y, &bits, 4);
        y = bits >= 0x0f800000u ? (bits == 0x0f800000u ? -MINUS : NAN) : y * 0x1p112f;
        x[i] = p[i].bits & 0x8000 ? -y : y;
    }
    std::memcpy(&u, x, sizeof u);
#endif
    return u;
}

INLINE Unit load_some(const T* p, int n) {
    T x[UNIT] = {};
    std::memcpy(x, p, n * sizeof(T));
    return load(x);
}

INLINE void store(Unit u, float* p) {
    std::memcpy(p, &u.a, sizeof u.a);
    std::memcpy(p + 16, &u.b, sizeof u.b);
}

// The nearest, ties to even; a NaN must not be rounded up to infinity.
INLINE u32 rounded(f32 x) {
    const u32 bits = reinterpret_cast<u32>(x);
    return x == x ? bits + 0x7fffu + (bits >> 16 & 1u) : u32{} + 0x7fc00000u;
}

INLINE void store(Unit u, bf16* p) {
    const u32 x = rounded(u.a) >> 16 | (rounded(u.b) & 0xffff0000u);
    std::memcpy(p, &x, sizeof x);
}

INLINE uint16_t half(float x) {
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(x, 0));
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (bits >= 0x38800000) return uint16_t(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
    float y;  // subnormal: adding 0.5 makes the processor round to multiples of 2^-24
    std::memcpy(&y, &bits, 4);
    y += 0.5f;
    std::memcpy(&bits, &y, 4);
    return uint16_t(sign | (bits - 0x3f000000));
#endif
}

INLINE void store(Unit u, f16* p) {
    for (int i = 0; i < 16; i++) {
        p[i].bits = half(u.a[i]);
        p[i + 16].bits = half(u.b[i]);
    }
}

INLINE void store_some(Unit u, T* p, int n) {
    T x[UNIT];
    store(u, x);
    std::memcpy(p, x, n * sizeof(T));
}

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

// Tokens of a request in a slot: the address of one is arithmetic.
struct Slots {
    const Call& call;
    // Offsets into K and V of tokens [first, first + n).
    void find(int64_t request, int64_t first, int n, int64_t* k, int64_t* v) const {
        const int64_t slot = call.slots[request];
        for (int i = 0; i < n; i++) {
            k[i] = slot * call.k_slot + (first + i) * call.k_token;
            v[i] = slot * call.v_slot + (first + i) * call.v_token;
        }
    }
};

// Tokens in blocks of a fixed number of them, anywhere: the address of one takes a look into a table.
struct Blocks {
    const Call& call;
    void find(int64_t request, int64_t first, int n, int64_t* k, int64_t* v) const {
        const int32_t* block = call.table + call.slots[request] * call.table_row + first / call.block_size;
        int64_t place = first % call.block_size;
        for (int i = 0; i < n; block++, place = 0) {
            const int64_t k_first = *block * call.k_slot, v_first = *block * call.v_slot;
            for (; i < n && place < call.block_size; i++, place++) {
                k[i] = k_first + place * call.k_token;
                v[i] = v_first + place * call.v_token;
            }
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

// What a chunk leaves behind for each query head: weighted V in units, then lane sums, and the maxima of all heads.
struct Sums {
    f32 *weighted, *total;
    float* top;
    int64_t width;  // vectors of `weighted` a head
    Sums(float* at, const Call& c) : width(2 * units(c.v_width)) {
        weighted = reinterpret_cast<f32*>(at);
        total = weighted + c.q_heads * width;
        top = reinterpret_cast<float*>(total + c.q_heads);
    }
    static int64_t floats(const Call& c) {
        return c.q_heads * (2 * units(c.v_width) + 1) * 16 + (c.q_heads + 15) / 16 * 16;
    }
};

inline int64_t packed_floats(const Call& c) { return c.q_heads * units(c.k_width) * UNIT; }

// Tokens of a request that are computed together: where they are, and which of them count (null: all).
struct Block {
    int n;
    const uint8_t* counts;
    int64_t k[BLOCK], v[BLOCK];
};

// The blocks of tokens [first, end) in which some token counts, at most CHUNK / BLOCK; returns how many.
template <class Where>
int cut(const Call& c, const Where& where, int64_t request, int64_t first, int64_t end, Block* blocks) {
    int count = 0;
    for (; first < end; first += BLOCK) {
        Block& block = blocks[count];
        const int n = block.n = int(std::min<int64_t>(BLOCK, end - first));
        int good = n - 1;
        block.counts = c.mask ? c.mask + request * c.mask_row + first : nullptr;
        if (block.counts)
            while (good >= 0 && !block.counts[good]) good--;
        if (good < 0) continue;
        count++;
        where.find(request, first, n, block.k, block.v);
        // A token that does not count is not read: its weight is 0, but 0 times NaN is NaN. Another is in its place.
        if (block.counts)
            for (int i = 0; i < n; i++)
                if (!block.counts[i]) block.k[i] = block.k[good], block.v[i] = block.v[good];
        for (int i = n; i < (n + 15) / 16 * 16; i++) block.k[i] = block.k[good];
    }
    return count;
}

// Rows that will be read next, asked for while others are computed: the processor's own guesses end with every page and
// every head.
struct Ahead {
    const T* base;
    const int64_t* at;
    int n;
    int64_t width;
    INLINE void fetch(int i) const {
        if (i >= n) return;
        const T* row = base + at[i];
        for (int64_t d = 0; d < (W ? W * UNIT : width); d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
    }
};

// Dot products of 16 rows of K with G queries, into lanes: scores[g * BLOCK + i]. Fetches 16 rows from `row` on.
template <int G>
INLINE void score(const T* k, const int64_t* at, const f32* q, int64_t width, float* scores, const Ahead& ahead,
                  int row) {
    constexpr int ROWS = G == 1 ? 8 : 4;
    const int64_t full = W ? W : width / UNIT, rest = W ? 0 : width % UNIT, stride = 2 * (W ? W : units(width));
    f32 parts[G][16];
    for (int r = 0; r < 16; r += ROWS) {
        for (int i = 0; i < ROWS; i++) ahead.fetch(row + r + i);
        f32 acc[ROWS][G] = {};
        for (int64_t u = 0; u < full; u++)
            for (int i = 0; i < ROWS; i++) {
                const Unit x = load(k + at[r + i] + u * UNIT);
                for (int g = 0; g < G; g++) {
                    acc[i][g] += x.a * q[g * stride + 2 * u];
                    acc[i][g] += x.b * q[g * stride + 2 * u + 1];
                }
            }
        if (rest)
            for (int i = 0; i < ROWS; i++) {
                const Unit x = load_some(k + at[r + i] + full * UNIT, int(rest));
                for (int g = 0; g < G; g++)
                    acc[i][g] += x.a * q[g * stride + 2 * full] + x.b * q[g * stride + 2 * full + 1];
            }
        for (int i = 0; i < ROWS; i++)
            for (int g = 0; g < G; g++) parts[g][r + i] = acc[i][g];
    }
    for (int g = 0; g < G; g++) {
        const f32 s = sums(parts[g]);
        std::memcpy(scores + g * BLOCK, &s, sizeof s);
    }
}

#if defined(__AVX512BF16__)
// The same where PAIRS: q is the query as it came, a head every `q_head` numbers, and is scaled last.
template <int G>
INLINE void score_pairs(const T* k, const int64_t* at, const T* q, int64_t q_head, float scale, float* scores,
                        const Ahead& ahead, int row) {
    constexpr int ROWS = G == 1 ? 8 : 4;
    const auto load_pairs = [](const T* p) { return (__m512bh)_mm512_loadu_si512(p); };
    f32 parts[G][16];
    for (int r = 0; r < 16; r += ROWS) {
        for (int i = 0; i < ROWS; i++) ahead.fetch(row + r + i);
        __m512 acc[ROWS][G];
        for (int i = 0; i < ROWS; i++)
            for (int g = 0; g < G; g++) acc[i][g] = _mm512_setzero_ps();
        for (int u = 0; u < W; u++)
            for (int i = 0; i < ROWS; i++) {
                const __m512bh x = load_pairs(k + at[r + i] + u * UNIT);
                for (int g = 0; g < G; g++)
                    acc[i][g] = _mm512_dpbf16_ps(acc[i][g], x, load_pairs(q + g * q_head + u * UNIT));
            }
        for (int i = 0; i < ROWS; i++)
            for (int g = 0; g < G; g++) parts[g][r + i] = (f32)acc[i][g];
    }
    for (int g = 0; g < G; g++) {
        const f32 s = sums(parts[g]) * scale;
        std::memcpy(scores + g * BLOCK, &s, sizeof s);
    }
}
#endif

// Adds n rows of V, U units of them (the last one of `rest` numbers, unless 0), to G weighted sums.
template <int G, int U>
INLINE void weigh(const T* v, const int64_t* at, int n, int rest, const float* weights, f32* weighted, int64_t stride,
                  const Ahead* ahead) {
    f32 acc[G][2 * U];
    for (int g = 0; g < G; g++)
        for (int u = 0; u < 2 * U; u++) acc[g][u] = weighted[g * stride + u];
    for (int i = 0; i < n; i++) {
        if (ahead) ahead->fetch(i);
        for (int u = 0; u < U; u++) {
            const Unit x = rest ? load_some(v + at[i] + u * UNIT, rest) : load(v + at[i] + u * UNIT);
            for (int g = 0; g < G; g++) {
                const float w = weights[g * BLOCK + i];
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
INLINE void weigh_pairs(const T* v, const int64_t* at, int n, const uint16_t* weights, f32* weighted, int64_t stride,
                        const Ahead* ahead) {
    __m512 acc[G][2 * U];
    for (int g = 0; g < G; g++)
        for (int u = 0; u < 2 * U; u++) acc[g][u] = (__m512)weighted[g * stride + u];
    for (int i = 0; i < n; i += 2) {
        if (ahead) ahead->fetch(i), ahead->fetch(i + 1);
        const T *one = v + at[i], *two = v + at[std::min(i + 1, n - 1)];  // without another, its weight is 0
        __m512bh pair[G];
        for (int g = 0; g < G; g++) {
            int32_t both;
            std::memcpy(&both, weights + g * BLOCK + i, sizeof both);
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

// One block of one KV head, for G of the query heads of a row, the first of which is `head`. `packed`: all of the row,
// scaled, unless PAIRS.
template <int G>
void attend(const Call& c, const Block& block, const T* k, const T* v, const T* row, const f32* packed, int64_t head,
            const Sums& sums, const Ahead& k_ahead, const Ahead& v_ahead) {
    float scores[G * BLOCK] __attribute__((aligned(64)));
    [[maybe_unused]] uint16_t pairs[PAIRS ? G * BLOCK : 1];
    const int vectors = std::min((block.n + 15) / 16, BLOCK / 16);
    for (int i = 0; i < vectors; i++)
#if defined(__AVX512BF16__)
        if constexpr (PAIRS)
            score_pairs<G>(k, block.k + 16 * i, row + head * c.q_head, c.q_head, c.scale, scores + 16 * i, k_ahead,
                           16 * i);
        else
#endif
            score<G>(k, block.k + 16 * i, packed + head * 2 * units(c.k_width), c.k_width, scores + 16 * i, k_ahead,
                     16 * i);
    for (int g = 0; g < G; g++) {
        f32* s = reinterpret_cast<f32*>(scores + g * BLOCK);
        if (c.softcap != 0)
            for (int i = 0; i < vectors; i++) s[i] = c.softcap * tangent(s[i] / c.softcap);
        for (int i = block.n; i < 16 * vectors; i++) scores[g * BLOCK + i] = MINUS;
        if (block.counts)
            for (int i = 0; i < block.n; i++)
                if (!block.counts[i]) scores[g * BLOCK + i] = MINUS;
        f32 top = s[0];
        for (int i = 1; i < vectors; i++) top = larger(top, s[i]);
        const float before = sums.top[head + g], now = std::max(before, largest(top));
        if (now > before) {
            f32* weighted = sums.weighted + (head + g) * sums.width;
            const float shrink = exponential(all(before - now))[0];
            for (int64_t u = 0; u < sums.width; u++) weighted[u] *= shrink;
            sums.total[head + g] *= shrink;
            sums.top[head + g] = now;
        }
#if defined(__AVX512BF16__)
        if constexpr (PAIRS) {
            sums.total[head + g] += exponentials(s, vectors, now, pairs + g * BLOCK);
            continue;
        }
#endif
        f32 total = {};
        for (int i = 0; i < vectors; i++) total += s[i] = exponential(s[i] - now);
        sums.total[head + g] += total;
    }
#if defined(__AVX512BF16__)
    if constexpr (PAIRS) {
        for (int64_t u = 0; u < W; u += 2)
            weigh_pairs<G, 2>(v + u * UNIT, block.v, block.n, pairs, sums.weighted + head * sums.width + 2 * u,
                              sums.width, u ? nullptr : &v_ahead);
        return;
    }
#endif
    const int64_t full = W ? W : c.v_width / UNIT;
    const int rest = W ? 0 : int(c.v_width % UNIT);
    f32* weighted = sums.weighted + head * sums.width;
    int64_t u = 0;
    for (; u + 2 <= full; u += 2)
        weigh<G, 2>(v + u * UNIT, block.v, block.n, 0, scores, weighted + 2 * u, sums.width,
                          u ? nullptr : &v_ahead);
    for (; u < full; u++)
        weigh<G, 1>(v + u * UNIT, block.v, block.n, 0, scores, weighted + 2 * u, sums.width,
                          u ? nullptr : &v_ahead);
    if (rest)
        weigh<G, 1>(v + u * UNIT, block.v, block.n, rest, scores, weighted + 2 * u, sums.width,
                          u ? nullptr : &v_ahead);
}

// One chunk of one request.
template <class Where>
void chunk(const Call& c, const Where& where, int64_t request, int64_t number, f32* packed, const Sums& sums) {
    const T *keys = reinterpret_cast<const T*>(c.k), *values = reinterpret_cast<const T*>(c.v);
    const int64_t group = c.q_heads / c.kv_heads, wide = units(c.k_width);
    const int64_t begin = first_token(c, request) + number * CHUNK;
    Block blocks[CHUNK / BLOCK];
    const int64_t count = cut(c, where, request, begin, std::min(begin + CHUNK, c.lengths[request]), blocks);
    for (int i = 0; count && i < blocks[0].n; i++) {
        Ahead{keys, blocks[0].k, blocks[0].n, c.k_width}.fetch(i);
        Ahead{values, blocks[0].v, blocks[0].n, c.v_width}.fetch(i);
    }

    const T* query = reinterpret_cast<const T*>(c.q) + c.rows[request] * c.q_row;
    for (int64_t h = 0; !PAIRS && h < c.q_heads; h++)
        for (int64_t u = 0; u < wide; u++) {
            const int64_t n = c.k_width - u * UNIT;
            const T* from = query + h * c.q_head + u * UNIT;
            const Unit x = n < UNIT ? load_some(from, int(n)) : load(from);
            packed[2 * (h * wide + u)] = x.a * c.scale;
            packed[2 * (h * wide + u) + 1] = x.b * c.scale;
        }
    std::fill(sums.weighted, sums.weighted + c.q_heads * sums.width, f32{});
    std::fill(sums.total, sums.total + c.q_heads, f32{});
    std::fill(sums.top, sums.top + c.q_heads, MINUS);

    // Head by head: where the tokens of a head lie one after the other, the processor then reads ahead by itself.
    for (int64_t h = 0; h < c.kv_heads; h++)
        for (int64_t b = 0; b < count; b++) {
            const bool last = b + 1 == count;
            const Block &block = blocks[b], &next = blocks[last ? 0 : b + 1];
            const int64_t next_head = h + last;
            for (int64_t g = 0; g < group;) {
                // Parts of about the same size, of at most GROUP heads; the first one fetches.
                const int64_t head = h * group + g, left = group - g, parts = (left + GROUP - 1) / GROUP;
                const int n = g || next_head == c.kv_heads ? 0 : next.n;
                const Ahead k_ahead{keys + next_head * c.k_head, next.k, n, c.k_width};
                const Ahead v_ahead{values + next_head * c.v_head, next.v, n, c.v_width};
                const T *k = keys + h * c.k_head, *v = values + h * c.v_head;
                const int64_t size = (left + parts - 1) / parts;
                switch (size) {
                    case 1: attend<1>(c, block, k, v, query, packed, head, sums, k_ahead, v_ahead); break;
                    case 2: attend<2>(c, block, k, v, query, packed, head, sums, k_ahead, v_ahead); break;
                    case 3: attend<3>(c, block, k, v, query, packed, head, sums, k_ahead, v_ahead); break;
                    default: attend<4>(c, block, k, v, query, packed, head, sums, k_ahead, v_ahead);
                }
                g += size;
            }
        }
}

// The output of one request, from the sums of its chunks.
void finish(const Call& c, int64_t request, float* first, int64_t count) {
    T* out = reinterpret_cast<T*>(c.out) + c.rows[request] * c.out_row;
    for (int64_t h = 0; h < c.q_heads; h++) {
        float top = c.sinks ? c.sinks[h] : MINUS, total = 0;
        for (int64_t i = 0; i < count; i++) top = std::max(top, Sums(first + i * Sums::floats(c), c).top[h]);
        if (c.sinks) total = exponential(all(c.sinks[h] - top))[0];
        for (int64_t i = 0; i < count; i++) {
            Sums part(first + i * Sums::floats(c), c), whole(first, c);
            const float share = part.top[h] == MINUS ? 0 : exponential(all(part.top[h] - top))[0];
            total += share * sum(part.total[h]);
            for (int64_t u = 0; u < part.width; u++) {
                const f32 x = part.weighted[h * part.width + u] * share;
                whole.weighted[h * part.width + u] = i ? whole.weighted[h * part.width + u] + x : x;
            }
        }
        const f32* weighted = Sums(first, c).weighted + h * 2 * units(c.v_width);
        const float scale = total > 0 ? 1 / total : 0;  // a request that may look nowhere: 0
        for (int64_t u = 0; u < units(c.v_width); u++)
            store_some(Unit{weighted[2 * u] * scale, weighted[2 * u + 1] * scale}, out + h * c.out_head + u * UNIT,
                       int(std::min<int64_t>(UNIT, c.v_width - u * UNIT)));
    }
}

// Where everything is in `scratch`, in floats. Tasks are the chunks of all requests, in order.
struct Room {
    int64_t tasks = 0, work = 0;  // work: numbers of K and V
    int64_t *first, *left;        // of each request: its first task, and how many are not done yet
    float *packed, *sums;
    explicit Room(const Call& c) {
        first = reinterpret_cast<int64_t*>((reinterpret_cast<uintptr_t>(c.scratch) + 63) & ~uintptr_t(63));
        left = first + (c.requests + 7) / 8 * 8;
        packed = reinterpret_cast<float*>(left + (c.requests + 7) / 8 * 8);
        sums = packed + c.threads * packed_floats(c);
        for (int64_t r = 0; r < c.requests; r++) {
            tasks += chunks(c, r);
            work += (c.lengths[r] - first_token(c, r)) * c.kv_heads * (c.k_width + c.v_width);
        }
    }
    int64_t bytes(const Call& c) const {
        return 64 + (c.requests + 7) / 8 * 8 * 16 + 4 * (c.threads * packed_floats(c) + tasks * Sums::floats(c));
    }
};

template <class Where>
void run(const Call& c, const Where& where) {
    const Room room(c);
    for (int64_t r = 0, task = 0; r < c.requests; task += chunks(c, r), r++) {
        room.first[r] = task;
        room.left[r] = chunks(c, r);
    }
    [[maybe_unused]] const int threads = int(room.work < SMALL ? 1 : std::min(c.threads, room.tasks));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < room.tasks; task++) {
#if defined(_OPENMP)
        float* packed = room.packed + omp_get_thread_num() * packed_floats(c);
#else
        float* packed = room.packed;
#endif
        const int64_t r = std::upper_bound(room.first, room.first + c.requests, task) - room.first - 1;
        float* sums = room.sums + task * Sums::floats(c);
        chunk(c, where, r, task - room.first[r], reinterpret_cast<f32*>(packed), Sums(sums, c));
        // Whoever does the last chunk of a request puts it together: nobody waits for the others.
        if (__atomic_sub_fetch(&room.left[r], 1, __ATOMIC_ACQ_REL) == 0)
            finish(c, r, room.sums + room.first[r] * Sums::floats(c), chunks(c, r));
    }
}

}  // namespace

extern "C" {

// Bytes that `scratch` must have.
int64_t vattention_scratch(const Call* call) { return Room(*call).bytes(*call); }

void vattention_decode(const Call* call) { run(*call, WHERE{*call}); }
}
