// Everything that is compiled for one instruction set, and its entry in the table.  Included by isa_*.cpp after the
// pragma that names the set and the macros that describe it; it includes only kernels.
namespace gradkern {
namespace GK_NAME {
#include "body.h"
#include "hash_rows.h"
#include "recurrent_rows.h"
#include "rescale_rows.h"
#include "statistics_rows.h"

#define GK_TEXT(x) GK_STRING(x)
#define GK_STRING(x) #x
extern const Isa kIsa{GK_TEXT(GK_NAME),
                      GK_VECTOR_BYTES,
                      kMaxNV,
                      supported,
                      run_hash,
                      {run_chain<float>, run_rescale<float>, run_secant<float>, run_recurrent<float>,
                       run_recurrent_vjp<float>, add_rows<float>, all_finite<float>, kMaxSeeds},
                      {run_chain<double>, run_rescale<double>, run_secant<double>, run_recurrent<double>,
                       run_recurrent_vjp<double>, add_rows<double>, all_finite<double>, kMaxSeeds}};
#undef GK_STRING
#undef GK_TEXT
}  // namespace GK_NAME
}  // namespace gradkern
