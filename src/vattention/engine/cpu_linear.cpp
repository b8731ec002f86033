// A few rows times the weights of linear layers, in bfloat16: what a decode pass consists of.
//
// With few rows a product is as fast as its weights can be read. They are read once, in the order in which they lie in
// memory, as a model stores them: `[outputs, inputs]`, nothing is packed. Several layers that share their input are one
// call. Threads share the outputs, 16 at a time; each number is summed in float32, in an order that depends on nothing
// but the number of inputs.
//
// Needs a processor with AVX512-BF16, see pairs.h.

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "pairs.h"

struct Layer {
    const uint16_t *weight, *bias;  // [outputs, inputs]; [outputs] or null
    int64_t outputs, column;        // where its outputs begin in a row of `out`
};

struct Call {
    int64_t rows, inputs, x_row, out_row, layers, threads;  // x_row, out_row: numbers from a row to the next
    const uint16_t* x;
    uint16_t* out;
    const Layer* layer;
};

#if WORKS
namespace {

constexpr int OUTPUTS = 16;  // of a task: a vector of results
constexpr int AHEAD = 6144;  // numbers: weights are asked for 12 KiB before they are used

INLINE __m512bh load(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE __m512bh load_some(const uint16_t* p, __mmask32 which) {
    return (__m512bh)_mm512_maskz_loadu_epi16(which, p);
}

// M rows of x times 16 rows of weights, R of them at a time; `n` of the 16 exist.
template <int M, int R>
INLINE void tile(const Call& c, const Layer& layer, int64_t row, int64_t first, int n) {
    f32 parts[M][OUTPUTS];
    const int64_t full = c.inputs / 32 * 32;
    const __mmask32 rest = (__mmask32(1) << (c.inputs - full)) - 1;
    const uint16_t* x = c.x + row * c.x_row;
    for (int r = 0; r < OUTPUTS; r += R) {
        const uint16_t* w[R];
        for (int i = 0; i < R; i++) w[i] = layer.weight + (first + std::min(r + i, n - 1)) * c.inputs;
        __m512 acc[M][R];
        for (int m = 0; m < M; m++)
            for (int i = 0; i < R; i++) acc[m][i] = _mm512_setzero_ps();
        for (int64_t k = 0; k < full; k += 32) {
            __m512bh weight[R];
            for (int i = 0; i < R; i++) {
                weight[i] = load(w[i] + k);
                _mm_prefetch(reinterpret_cast<const char*>(w[i] + k + AHEAD), _MM_HINT_T1);
            }
            for (int m = 0; m < M; m++) {
                const __m512bh y = load(x + m * c.x_row + k);
                for (int i = 0; i < R; i++) acc[m][i] = _mm512_dpbf16_ps(acc[m][i], y, weight[i]);
            }
        }
        if (rest)
            for (int i = 0; i < R; i++) {
                const __m512bh weight = load_some(w[i] + full, rest);
                for (int m = 0; m < M; m++)
                    acc[m][i] = _mm512_dpbf16_ps(acc[m][i], load_some(x + m * c.x_row + full, rest), weight);
            }
        for (int m = 0; m < M; m++)
            for (int i = 0; i < R; i++) parts[m][r + i] = (f32)acc[m][i];
    }
    const __mmask16 which = (1u << n) - 1;
    __m512 bias = _mm512_setzero_ps();
    if (layer.bias) {
        const __m256i bits = _mm256_maskz_loadu_epi16(which, layer.bias + first);
        bias = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    }
    for (int m = 0; m < M; m++) {
        const __m512 y = (__m512)sums(parts[m]) + bias;
        _mm256_mask_storeu_epi16(c.out + (row + m) * c.out_row + layer.column + first, which, (__m256i)_mm512_cvtneps_pbh(y));
    }
}

void task(const Call& c, const Layer& layer, int64_t first) {
    const int n = int(std::min<int64_t>(OUTPUTS, layer.outputs - first));
    int64_t row = 0;
    for (; row + 8 <= c.rows; row += 8) tile<8, 2>(c, layer, row, first, n);
    switch (c.rows - row) {
        case 1: tile<1, 8>(c, layer, row, first, n); break;
        case 2: tile<2, 4>(c, layer, row, first, n); break;
        case 3: tile<3, 4>(c, layer, row, first, n); break;
        case 4: tile<4, 4>(c, layer, row, first, n); break;
        case 5: tile<5, 4>(c, layer, row, first, n); break;
        case 6: tile<6, 4>(c, layer, row, first, n); break;
        case 7: tile<7, 2>(c, layer, row, first, n); break;
    }
}

}  // namespace
#endif

#if WORKS
extern "C" void vattention_linear(const Call* call) {
    const Call& c = *call;
    int64_t tasks = 0;
    for (int64_t i = 0; i < c.layers; i++) tasks += (c.layer[i].outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(int(c.threads)) schedule(static)
    for (int64_t number = 0; number < tasks; number++) {
        const Layer* layer = c.layer;
        int64_t first = number * OUTPUTS;
        for (; first >= layer->outputs; layer++) first -= (layer->outputs + OUTPUTS - 1) / OUTPUTS * OUTPUTS;
        task(c, *layer, first);
    }
}
#endif
