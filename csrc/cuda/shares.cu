// DeepLift's multipliers on the GPU.
#include "shares.cuh"
#include "shares.h"

namespace gradkern::cuda {

template <class T>
const char* launch_shares(const SharesArgs<T>& args, int64_t windows, bool pooled, void* stream) {
  const int64_t wanted = (windows + kShareThreads - 1) / kShareThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < 16384 ? wanted : 16384),
                 count = static_cast<unsigned>(windows);
  const auto kernel = !pooled ? secant_kernel<T> : args.relu ? shares_kernel<T, true> : shares_kernel<T, false>;
  GK_LAUNCH(kernel, blocks, kShareThreads, 0, stream, args, count);
  return error_text(cudaGetLastError());
}

template const char* launch_shares<float>(const SharesArgs<float>&, int64_t, bool, void*);
template const char* launch_shares<double>(const SharesArgs<double>&, int64_t, bool, void*);

}  // namespace gradkern::cuda
