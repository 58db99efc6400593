// The interpreter for whatever the compiler targets by default: 16-byte vectors, which every x86-64 and Arm64 has.
#include <cmath>
#include <cstdint>

#include "isa.h"

#define GK_ISA 0
#define GK_VECTOR_BYTES 16
#define GK_REGISTERS 16
#define GK_INLINE inline __attribute__((always_inline))

namespace gradkern {
namespace portable {
#include "body.h"
#include "rescale_rows.h"
bool supported() { return true; }
}  // namespace portable
const Isa kPortable{"portable",
                    GK_VECTOR_BYTES,
                    portable::supported,
                    {portable::run_chain<float>, portable::run_rescale<float>, portable::run_secant<float>},
                    {portable::run_chain<double>, portable::run_rescale<double>, portable::run_secant<double>}};
}  // namespace gradkern
