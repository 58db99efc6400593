// The chain kernel in TF32.
#include "launch.cuh"

namespace gradkern::cuda {
template const char* launch_chain<float, kTf32>(const Args<float>&, int, int, size_t, void*);
template const char* prepare_chain<float, kTf32>(int);
}  // namespace gradkern::cuda
