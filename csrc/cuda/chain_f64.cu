// The chain kernel in double precision.
#include "launch.cuh"

namespace gradkern::cuda {
template const char* launch_chain<double, 0>(const Args<double>&, int, int, size_t, void*);
template const char* prepare_chain<double, 0>(int);
}  // namespace gradkern::cuda
