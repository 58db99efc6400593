// CUDA launch of DeepLift's multipliers: torch's device and stream around the kernel, which does not know torch.

#include <algorithm>

#include "../op_bodies.h"
#include "rescale.h"
#include "torch_cuda.h"

namespace gradkern::cuda {

namespace {

constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // numbers of one launch: the kernel counts in 32 bits

// Each launch takes as many samples as 32 bits can count, which is nearly always all of them.
template <class T>
void launch(RescaleArgs<T> args, int64_t samples, bool pooled, cudaStream_t stream) {
  const Pool& p = args.pool;
  const int64_t read = args.channels * p.H * p.W, windows = args.channels * p.oh * p.ow;
  const int64_t reach = std::max((p.oh - 1) * p.sh + (p.kh - 1) * p.dh, (p.ow - 1) * p.sw + (p.kw - 1) * p.dw);
  GRADKERN_CHECK(std::max({read, windows, reach, p.ph, p.pw}) <= kMost, "gradkern: rescale: a sample of ", read,
                 " numbers and ", windows, " windows is too large");
  const int64_t most = kMost / std::max(read, windows);
  for (int64_t first = 0; first < samples; first += most) {
    const int64_t count = std::min(most, samples - first);
    const char* const error = launch_rescale<T>(args, count * windows, pooled, stream);
    GRADKERN_CHECK(!error, "gradkern: the rescale kernel could not be launched: ", error ? error : "");
    args.z += count * read;
    args.out += count * windows;
    if (args.ref_rows != 1) args.ref += count * read;
  }
}

Tensor rescale(const Tensor& z, const Tensor& reference, const Ints& pool, bool relu, double eps) {
  const DeviceGuard guard(z);
  const cudaStream_t stream = current_stream(z.get_device_index());
  Tensor out = rescale_result(z, reference, pool, relu);
  if (out.numel() == 0) return out;
  if (z.scalar_type() == ScalarType::Float)
    launch(rescale_args<float>(z, reference, pool, relu, eps, out), z.size(0), !pool.empty(), stream);
  else launch(rescale_args<double>(z, reference, pool, relu, eps, out), z.size(0), !pool.empty(), stream);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradkern, CUDA, m) { m.impl("rescale", TORCH_BOX(&rescale)); }

}  // namespace gradkern::cuda
