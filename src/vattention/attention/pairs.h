// For sources that live off the processor's own product of pairs of bfloat16, AVX512-BF16. Compiled for a processor
// without it, WORKS is 0, and so is what the library says of itself: whoever loads it does without then.
#pragma once

#include <cstdint>
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define WORKS 1
#include <immintrin.h>
#include "vectors.h"
#else
#define WORKS 0
#endif

extern "C" int vattention_works() { return WORKS; }
