// CUDA launch of a step: torch's device and stream around the kernels, which know nothing of torch.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "step.h"

namespace gradkern::cuda {

namespace {

// A tensor of this dtype on this device, in one piece.
void check_tensor(const at::Tensor& t, const at::Tensor& like, at::ScalarType dtype, int64_t least, const char* what) {
  TORCH_CHECK(t.is_contiguous() && t.device() == like.device() && t.scalar_type() == dtype && t.numel() >= least,
              "gradkern: step: expected ", what, " to be contiguous ", dtype, " on ", like.device(), " with at least ",
              least, " elements, got ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
}

template <class T, int Math>
void launch_checked(const at::Tensor& src, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& add,
                    const at::Tensor& mask, const at::Tensor& choice, const at::Tensor& tables, at::IntArrayRef sizes,
                    bool narrow, const at::Tensor& out) {
  StepArgs<T> a{};
  int* const fields[] = {&a.seeds, &a.inner,  &a.groups, &a.K,      &a.O,      &a.ldw,         &a.all_taps, &a.Hs,
                         &a.Ws,    &a.step_h, &a.step_w, &a.H,      &a.W,      &a.out_h,       &a.out_w,    &a.linear,
                         &a.relu,  &a.pool_h, &a.pool_w, &a.pool_H, &a.pool_W, &a.phase_count, &a.places};
  TORCH_CHECK(sizes.size() == 1 + std::size(fields), "gradkern: step: expected ", 1 + std::size(fields), " sizes, got ",
              sizes.size(), "; this extension and the Python package are of different versions");
  a.rows = sizes[0];
  for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = static_cast<int>(sizes[i + 1]);
  const int64_t channels = int64_t(a.groups) * a.O, extent = int64_t(a.H) * a.W;
  const int64_t kept = a.rows / std::max(a.seeds, 1), written = a.rows * channels;
  const auto dtype = weight.scalar_type();
  TORCH_CHECK(a.rows > 0 && a.seeds > 0 && a.inner > 0 && a.rows % (int64_t(a.seeds) * a.inner) == 0 &&
                  a.rows * a.places < (int64_t(1) << 31) - 256,
              "gradkern: step: ", a.rows, " rows of ", a.places, " places do not fit ", a.seeds, " seeds or 2^31");
  check_tensor(src, weight, dtype, a.rows * a.groups * a.K * a.Hs * a.Ws, "the source");
  check_tensor(weight, weight, dtype, int64_t(a.groups) * a.all_taps * a.K * a.ldw, "the weight");
  if (bias.defined()) check_tensor(bias, weight, dtype, channels, "the bias");
  if (add.defined()) check_tensor(add, weight, dtype, written * extent, "the sum's other side");
  if (mask.defined()) check_tensor(mask, weight, dtype, kept * channels * extent, "the mask");
  if (choice.defined()) {
    check_tensor(choice, weight, at::kByte, kept * channels * extent, "the choice");
    TORCH_CHECK(a.pool_h * a.H <= a.pool_H && a.pool_w * a.W <= a.pool_W,
                "gradkern: step: the pool's windows overhang");
  }
  check_tensor(out, weight, dtype, written * (choice.defined() ? int64_t(a.pool_H) * a.pool_W : extent), "the result");
  check_tensor(tables, weight, at::kInt, 6 * a.phase_count, "the tables");
  const auto read = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
  a.src = read(src), a.weight = read(weight), a.bias = read(bias), a.add = read(add), a.mask = read(mask);
  a.choice = choice.defined() ? choice.const_data_ptr<uint8_t>() : nullptr;
  a.out = out.mutable_data_ptr<T>();
  a.phases = tables.const_data_ptr<int32_t>();
  a.taps = a.phases + 6 * a.phase_count;

  const auto stream = c10::cuda::getCurrentCUDAStream(src.device().index());
  const char* const error = launch_step<T, Math>(a, narrow, stream.stream());
  TORCH_CHECK(!error, "gradkern: the step kernel could not be launched: ", error ? error : "");
  // Weights live in gradkern's cache and may be freed by another thread while this stream still reads them.
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None) {
    weight.record_stream(stream);
    tables.record_stream(stream);
    if (bias.defined()) bias.record_stream(stream);
  }
}

void step(const at::Tensor& src, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
          const std::optional<at::Tensor>& add, const std::optional<at::Tensor>& mask,
          const std::optional<at::Tensor>& choice, const at::Tensor& tables, at::IntArrayRef sizes, int64_t math,
          bool narrow, at::Tensor out) {
  if (src.numel() == 0) return;
  const bool single = weight.scalar_type() == at::kFloat;
  TORCH_CHECK(single || weight.scalar_type() == at::kDouble, "gradkern: step takes float32 or float64, got ",
              weight.scalar_type());
  TORCH_CHECK(math == kPlain || (single && (math == kTf32 || math == kBf16 || math == kTf32x3)),
              "gradkern: step: expected an arithmetic of 0 … 3 (0 for float64), got ", math);
  const c10::cuda::CUDAGuard guard(src.device());
  const auto go = !single           ? launch_checked<double, kPlain>
                  : math == kTf32x3 ? launch_checked<float, kTf32x3>
                  : math == kTf32   ? launch_checked<float, kTf32>
                  : math == kBf16   ? launch_checked<float, kBf16>
                                    : launch_checked<float, kPlain>;
  const at::Tensor none;
  go(src, weight, bias.value_or(none), add.value_or(none), mask.value_or(none), choice.value_or(none), tables, sizes,
     narrow, out);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkern, CUDA, m) { m.impl("step", step); }

}  // namespace gradkern::cuda
