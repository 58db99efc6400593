// The interpreter compiled for AVX2.
#if defined(__x86_64__) || defined(_M_X64)
#include <cmath>
#include <cstdint>
#include <immintrin.h>

#include "isa.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt,aes")
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,popcnt,aes"))), apply_to = function)
#endif
#define GK_NAME avx2
#define GK_INTRINSICS GK_AVX_INTRINSICS
#define GK_VECTOR_BYTES 32
#define GK_REGISTERS 16
#define GK_AES  // for the hash
#define GK_INLINE inline __attribute__((always_inline))

namespace gradkern::avx2 {
static bool supported() {  // a virtual machine may mask each of them
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("aes");
}
}  // namespace gradkern::avx2
#include "isa_body.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#pragma GCC pop_options
#endif
