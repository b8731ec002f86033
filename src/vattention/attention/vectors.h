// Vectors of 16 floats, and what is done with them lane by lane: for the sources beside it.
//
// Written with the vector extensions of GCC and clang, which the compiler splits for machines with narrower registers.
#pragma once

#include <cstdint>
#include <limits>

#define INLINE inline __attribute__((always_inline))

namespace {

using f32 = float __attribute__((vector_size(64)));
using u32 = uint32_t __attribute__((vector_size(64)));

constexpr float MINUS = -std::numeric_limits<float>::infinity();

INLINE f32 all(float x) { return x - f32{}; }
INLINE f32 larger(f32 a, f32 b) { return a > b ? a : b; }

// Halves of a vector change places, then quarters, and so on.
INLINE f32 swap8(f32 x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE f32 swap4(f32 x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
INLINE f32 swap2(f32 x) { return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
INLINE f32 swap1(f32 x) { return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }

INLINE float largest(f32 x) {
    x = larger(x, swap8(x));
    x = larger(x, swap4(x));
    x = larger(x, swap2(x));
    return larger(x, swap1(x))[0];
}

INLINE float sum(f32 x) {
    x += swap8(x);
    x += swap4(x);
    x += swap2(x);
    return (x + swap1(x))[0];
}

// e^x for x <= 0 within 2 units of the last place; 0 below -87, where float32 ends.
INLINE f32 exponential(f32 x) {
    const f32 in = larger(x, all(-87.f));
    const f32 shifted = in * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to a whole number, in the lowest bits
    const f32 whole = shifted - 12582912.f;
    const f32 r = (in - whole * 0.693359375f) + whole * 2.12194440e-4f;
    f32 y = all(1.f / 5040);
    y = y * r + 1.f / 720;
    y = y * r + 1.f / 120;
    y = y * r + 1.f / 24;
    y = y * r + 1.f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.f;
    y = y * r + 1.f;
    const u32 power = (reinterpret_cast<u32>(shifted) << 23) + (127u << 23);
    y *= reinterpret_cast<f32>(power);
    return x < -87.f ? f32{} : y;
}

// 2^x for x <= 0 within 3 millionths of it, which is enough for what becomes bfloat16; 0 below -126.
INLINE f32 power_of_two(f32 x) {
    const f32 in = larger(x, all(-126.f));
    const f32 shifted = in + 12582912.f;  // as above
    const f32 r = in - (shifted - 12582912.f);
    f32 y = all(1.33335581e-3f);
    y = y * r + 9.61812911e-3f;
    y = y * r + 5.55041087e-2f;
    y = y * r + 0.240226507f;
    y = y * r + 0.693147181f;
    y = y * r + 1.f;
    y = reinterpret_cast<f32>(reinterpret_cast<u32>(y) + (reinterpret_cast<u32>(shifted) << 23));
    return x < -126.f ? f32{} : y;
}

INLINE f32 tangent(f32 x) {  // hyperbolic
    const f32 size = larger(x, -x);
    const f32 e = exponential(-2.f * size);
    const f32 y = (1.f - e) / (1.f + e);
    return x < 0.f ? -y : y;
}

constexpr auto plus = [](f32 a, f32 b) { return a + b; };

// A fourth of the work of `folded`: quarters of the result hold a, b, c and d, each folded to 4 lanes by `op`.
template <class Op>
INLINE f32 folded_to_quarters(f32 a, f32 b, f32 c, f32 d, Op op) {
    const auto halves = [&](f32 a, f32 b) {
        return op(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                  __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    };
    const f32 x = halves(a, b), y = halves(c, d);
    return op(__builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
              __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
}

// 16 vectors as one: lane i is all lanes of x[i] folded by `op`, such as their sum, where quarters[i] is
// `folded_to_quarters` of x[i], x[i + 4], x[i + 8] and x[i + 12].
template <class Op>
INLINE f32 folded(const f32* quarters, Op op) {
    const auto pairs = [&](f32 a, f32 b) {
        return op(__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                  __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
    };
    const f32 x = pairs(quarters[0], quarters[1]), y = pairs(quarters[2], quarters[3]);
    return op(__builtin_shufflevector(x, y, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30),
              __builtin_shufflevector(x, y, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31));
}

}  // namespace
