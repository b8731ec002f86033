// Rows times the weights of linear layers, in bfloat16: a decode pass is a few rows, a prompt some hundred.
//
// Weights are laid out for this: blocks of 32 outputs, in them pairs of inputs, in a pair the outputs side by side. A
// pair of a row, in all lanes, times that is 32 sums that go on, so nothing is ever added up across lanes, and every
// number is summed in float32 in the order of the inputs, whatever the other rows are.
//
// Few rows are as fast as weights can be read: each thread reads its share from one end to the other, and asks for it in
// that very order some time before: a line here and a line there come a fifth slower. Many are as fast as products can
// be computed: blocks of rows stay in the second cache, and a block of outputs in the first.
//
// Needs a processor with AVX512-BF16, see pairs.h.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include "pairs.h"

struct Call {
    int64_t rows, inputs, outputs, threads;  // inputs: even
    const uint16_t *x, *packed;              // [rows, inputs]; as `vattention_pack` leaves it
    const float* bias;                       // [outputs] or null
    uint16_t* out;                           // [rows, outputs]
};

#if WORKS
namespace {

constexpr int OUTPUTS = 32;  // of a block: two vectors
constexpr int ROWS = 14;     // of a tile: with two vectors for each, and those of the weights, what registers hold
constexpr int BLOCK = 18 * ROWS;
constexpr int FEW = 32;      // rows up to which reading the weights is what takes time
constexpr int AHEAD = 4096;  // numbers: weights are asked for 8 KiB before they are used
constexpr int FITS = 1 << 17;  // numbers of a block of outputs that fits into the second cache, with its successor

INLINE __m512bh load(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }

INLINE void ask(const uint16_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// M rows of x times a block of outputs, `n` of which exist. Meanwhile `soon` is asked for, `step` numbers for each pair.
template <int M>
INLINE void tile(const Call& c, int64_t row, int64_t block, int n, const uint16_t* soon, int64_t step) {
    const uint16_t* x = c.x + row * c.inputs;
    const uint16_t* w = c.packed + block * OUTPUTS * c.inputs;
    __m512 sums[M][2];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < c.inputs; k += 2, w += 2 * OUTPUTS, soon += step) {
        const __m512bh w0 = load(w), w1 = load(w + OUTPUTS);
        ask(soon);
        if (step > OUTPUTS) ask(soon + OUTPUTS);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            int pair;
            std::memcpy(&pair, x + m * c.inputs + k, sizeof pair);
            const __m512bh y = (__m512bh)_mm512_set1_epi32(pair);
            sums[m][0] = _mm512_dpbf16_ps(sums[m][0], y, w0);
            sums[m][1] = _mm512_dpbf16_ps(sums[m][1], y, w1);
        }
    }
    const int64_t first = block * OUTPUTS;
    const __mmask32 which = __mmask32((uint64_t(1) << n) - 1);
    __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (c.bias) {
        bias[0] = _mm512_maskz_loadu_ps(__mmask16(which), c.bias + first);
        bias[1] = _mm512_maskz_loadu_ps(__mmask16(which >> 16), c.bias + first + 16);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
        _mm512_mask_storeu_epi16(c.out + (row + m) * c.outputs + first, which,
                                 (__m512i)_mm512_cvtne2ps_pbh(sums[m][1] + bias[1], sums[m][0] + bias[0]));
}

// Rows from `row` to `end` times a block of outputs, in tiles that are as high as each other. If a few rows are more than
// a tile, the block is read again from the caches, and the first two tiles ask for one half each of the next.
void part(const Call& c, int64_t row, int64_t end, int64_t block) {
    const int n = int(std::min<int64_t>(OUTPUTS, c.outputs - block * OUTPUTS));
    const int64_t size = OUTPUTS * c.inputs, tiles = (end - row + ROWS - 1) / ROWS;
    const bool whole = tiles > 1 && c.rows <= FEW && size <= FITS;
    for (int64_t i = 0, m; i < tiles; i++, row += m) {
        const uint16_t* soon = c.packed + block * size + (whole ? size + i * size / 2 : AHEAD);
        const int64_t step = !whole ? 2 * OUTPUTS : i < 2 ? OUTPUTS : 0;
        switch (m = (end - row) / (tiles - i)) {
            case 1: tile<1>(c, row, block, n, soon, step); break;
            case 2: tile<2>(c, row, block, n, soon, step); break;
            case 3: tile<3>(c, row, block, n, soon, step); break;
            case 4: tile<4>(c, row, block, n, soon, step); break;
            case 5: tile<5>(c, row, block, n, soon, step); break;
            case 6: tile<6>(c, row, block, n, soon, step); break;
            case 7: tile<7>(c, row, block, n, soon, step); break;
            case 8: tile<8>(c, row, block, n, soon, step); break;
            case 9: tile<9>(c, row, block, n, soon, step); break;
            case 10: tile<10>(c, row, block, n, soon, step); break;
            case 11: tile<11>(c, row, block, n, soon, step); break;
            case 12: tile<12>(c, row, block, n, soon, step); break;
            case 13: tile<13>(c, row, block, n, soon, step); break;
            case 14: tile<14>(c, row, block, n, soon, step); break;
        }
    }
}

}  // namespace

extern "C" {

// `weight` [outputs, inputs] into `packed`, which has room for outputs rounded up to 32: those behind are zero.
void vattention_pack(const uint16_t* weight, uint16_t* packed, int64_t outputs, int64_t inputs, int64_t threads) {
    const int64_t blocks = (outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(int(threads))
    for (int64_t block = 0; block < blocks; block++) {
        uint16_t* to = packed + block * OUTPUTS * inputs;
        for (int64_t i = 0; i < OUTPUTS * inputs; i++) {
            const int64_t output = block * OUTPUTS + i % (2 * OUTPUTS) / 2, input = i / (2 * OUTPUTS) * 2 + i % 2;
            to[i] = output < outputs ? weight[output * inputs + input] : 0;
        }
    }
}

void vattention_linear(const Call* call) {
    const Call& c = *call;
    const int64_t blocks = (c.outputs + OUTPUTS - 1) / OUTPUTS;
    if (c.rows <= FEW) {
#pragma omp parallel for num_threads(int(c.threads)) schedule(static)
        for (int64_t block = 0; block < blocks; block++) part(c, 0, c.rows, block);
        return;
    }
    const int64_t parts = (c.rows + BLOCK - 1) / BLOCK;
    const int64_t height = (c.rows + parts * ROWS - 1) / (parts * ROWS) * ROWS;  // whole tiles, all parts alike
#pragma omp parallel for num_threads(int(c.threads)) schedule(dynamic)
    for (int64_t task = 0; task < parts * blocks; task++) {
        const int64_t row = task / blocks * height;
        part(c, row, std::min(c.rows, row + height), task % blocks);
    }
}
}
#endif
