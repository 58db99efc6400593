// The interpreter for whatever the compiler targets by default: 16-byte vectors, which every x86-64 and Arm64 has.
#include <cmath>
#include <cstdint>

#include "isa.h"

#define GK_NAME portable
#define GK_INTRINSICS GK_NO_INTRINSICS
#define GK_VECTOR_BYTES 16
#define GK_REGISTERS 16
#define GK_INLINE inline __attribute__((always_inline))

namespace gradkern::portable {
static bool supported() { return true; }
}  // namespace gradkern::portable
#include "isa_body.h"
