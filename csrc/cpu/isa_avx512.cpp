// The interpreter compiled for AVX-512.
#if defined(__x86_64__) || defined(_M_X64)
#include <cmath>
#include <cstdint>
#include <immintrin.h>

#include "isa.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#endif
#define GK_NAME avx512
#define GK_INTRINSICS GK_AVX512_INTRINSICS
#define GK_VECTOR_BYTES 64
#define GK_REGISTERS 32
#define GK_INLINE inline __attribute__((always_inline))

namespace gradkern::avx512 {
static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}
}  // namespace gradkern::avx512
#include "isa_body.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#pragma GCC pop_options
#endif
