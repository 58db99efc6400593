// The interpreter compiled for Arm's Advanced SIMD (NEON), which every 64-bit Arm processor has: 32 registers of 16
// bytes, and a fused multiply-add.  The compiler may use it everywhere, so there is no pragma.
#if defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>

#include <cmath>
#include <cstdint>

#include "isa.h"

#define GK_NAME neon
#define GK_INTRINSICS GK_NEON_INTRINSICS
#define GK_VECTOR_BYTES 16
#define GK_REGISTERS 32
#define GK_INLINE inline __attribute__((always_inline))

namespace gradkern::neon {
static bool supported() { return true; }
}  // namespace gradkern::neon
#include "isa_body.h"
#endif
