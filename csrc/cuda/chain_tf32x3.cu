// The chain kernel in three TF32 products.
#include "launch.cuh"

namespace gradkern::cuda {
template const char* launch_chain<float, kTf32x3>(const Args<float>&, int, int, size_t, void*);
template const char* prepare_chain<float, kTf32x3>(int);
}  // namespace gradkern::cuda
