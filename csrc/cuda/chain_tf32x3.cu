// The chain kernel with three TF32 products for one of fp32.
#include "launch.cuh"

namespace gradkern::cuda {
template const char* launch_chain<float, 3>(const Args<float>&, int, int, size_t, void*);
template const char* prepare_chain<float, 3>(int);
}  // namespace gradkern::cuda
