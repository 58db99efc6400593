// The chain kernel in TF32.
#include "launch.cuh"

namespace gradkern::cuda {
template const char* launch_chain<float, 1>(const Args<float>&, int, int, size_t, void*);
template const char* prepare_chain<float, 1>(int);
}  // namespace gradkern::cuda
