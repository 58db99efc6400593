// The chain kernel in double precision.
#include "launch.cuh"

namespace gradkern::cuda {
template const char* launch_chain<double, kPlain>(const Args<double>&, int, int, size_t, void*);
template const char* prepare_chain<double, kPlain>(int);
}  // namespace gradkern::cuda
