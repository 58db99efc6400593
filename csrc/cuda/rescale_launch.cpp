// CUDA launch of DeepLift's multipliers: torch's device and stream around the kernel, which does not know torch.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "../op_bodies.h"
#include "rescale.h"

namespace gradkern::cuda {

namespace {

constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // numbers of one launch: the kernel counts in 32 bits

// Each launch takes as many samples as 32 bits can count, which is nearly always all of them.
template <class T>
void launch(RescaleArgs<T> args, int64_t samples, bool pooled) {
  const Pool& p = args.pool;
  const int64_t read = args.channels * p.H * p.W, windows = args.channels * p.oh * p.ow;
  const int64_t reach = std::max((p.oh - 1) * p.sh + (p.kh - 1) * p.dh, (p.ow - 1) * p.sw + (p.kw - 1) * p.dw);
  TORCH_CHECK(std::max({read, windows, reach, p.ph, p.pw}) <= kMost, "gradkern: rescale: a sample of ", read,
              " numbers and ", windows, " windows is too large");
  const int64_t most = kMost / std::max(read, windows);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for (int64_t first = 0; first < samples; first += most) {
    const int64_t count = std::min(most, samples - first);
    const char* const error = launch_rescale<T>(args, count * windows, pooled, stream.stream());
    TORCH_CHECK(!error, "gradkern: the rescale kernel could not be launched: ", error ? error : "");
    args.z += count * read;
    args.out += count * windows;
    if (args.ref_rows != 1) args.ref += count * read;
  }
}

at::Tensor rescale(const at::Tensor& z, const at::Tensor& reference, at::IntArrayRef pool, bool relu, double eps) {
  const c10::cuda::CUDAGuard guard(z.device());
  at::Tensor out = rescale_result(z, reference, pool, relu);
  if (out.numel() == 0) return out;
  if (z.scalar_type() == at::kFloat)
    launch(rescale_args<float>(z, reference, pool, relu, eps, out), z.size(0), !pool.empty());
  else launch(rescale_args<double>(z, reference, pool, relu, eps, out), z.size(0), !pool.empty());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkern, CUDA, m) { m.impl("rescale", rescale); }

}  // namespace gradkern::cuda
