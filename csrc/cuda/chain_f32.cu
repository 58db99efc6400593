// The chain kernel in single precision.
#include "launch.cuh"

namespace gradkern::cuda {
template const char* launch_chain<float, 0>(const Args<float>&, int, int, size_t, void*);
template const char* prepare_chain<float, 0>(int);
}  // namespace gradkern::cuda
