// The chain kernel in single precision.
#include "launch.cuh"

namespace gradkern::cuda {
template const char* launch_chain<float, kPlain>(const Args<float>&, int, int, size_t, void*);
template const char* prepare_chain<float, kPlain>(int);
}  // namespace gradkern::cuda
