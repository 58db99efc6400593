// The chain kernel in bf16.
#include "launch.cuh"

namespace gradkern::cuda {
template const char* launch_chain<float, kBf16>(const Args<float>&, int, int, size_t, void*);
template const char* prepare_chain<float, kBf16>(int);
}  // namespace gradkern::cuda
