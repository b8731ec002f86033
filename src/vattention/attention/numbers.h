// What K, V, queries and outputs are stored as, and how 32 of their numbers become floats and floats become them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

constexpr int UNIT = 32;  // numbers loaded at once; a head is padded to whole units, with zeros

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

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

template <class T>
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

template <class T>
INLINE void store_some(Unit u, T* p, int n) {
    T x[UNIT];
    store(u, x);
    std::memcpy(p, x, n * sizeof(T));
}

}  // namespace
