// DeepLift's multipliers on the GPU.
#include "rescale.cuh"
#include "rescale.h"

namespace gradkern::cuda {

template <class T>
const char* launch_rescale(const RescaleArgs<T>& args, int64_t windows, bool pooled, void* stream) {
  const int64_t wanted = (windows + kRescaleThreads - 1) / kRescaleThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < 16384 ? wanted : 16384),
                 count = static_cast<unsigned>(windows);
  const auto kernel = !pooled ? secant_kernel<T> : args.relu ? rescale_kernel<T, true> : rescale_kernel<T, false>;
  GK_LAUNCH(kernel, blocks, kRescaleThreads, 0, stream, args, count);
  return error_text(cudaGetLastError());
}

template const char* launch_rescale<float>(const RescaleArgs<float>&, int64_t, bool, void*);
template const char* launch_rescale<double>(const RescaleArgs<double>&, int64_t, bool, void*);

}  // namespace gradkern::cuda
