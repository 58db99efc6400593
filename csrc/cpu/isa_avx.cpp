// The interpreter compiled for AVX, without FMA and integer vectors (processors of 2011 to 2013).
#if defined(__x86_64__) || defined(_M_X64)
#include <cmath>
#include <cstdint>
#include <immintrin.h>

#include "isa.h"

#pragma GCC push_options
#pragma GCC target("avx,popcnt")
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx,popcnt"))), apply_to = function)
#endif
#define GK_NAME avx
#define GK_INTRINSICS GK_AVX_INTRINSICS
#define GK_VECTOR_BYTES 32
#define GK_REGISTERS 16
#define GK_INLINE inline __attribute__((always_inline))

namespace gradkern::avx {
static bool supported() { return __builtin_cpu_supports("avx") && __builtin_cpu_supports("popcnt"); }
}  // namespace gradkern::avx
#include "isa_body.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#pragma GCC pop_options
#endif
