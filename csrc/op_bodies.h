// The bodies of the ops that every device shares: checks and allocations around a backend's kernels.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "chain_call.h"
#include "checks.h"
#include "records.h"
#include "rescale_rule.h"

namespace gradkern {

// The op `chain_forward` of a backend, whose `Run` launches a checked, non-empty call.
template <class Sizes, void (*Run)(const ChainCall&, const Sizes&)>
std::vector<at::Tensor> chain_forward(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables,
                                      const at::Tensor& forward, at::IntArrayRef sizes, at::IntArrayRef output_sizes) {
  ChainCall call{inputs, packed, tables, forward, forward.slice(0, 0, 0), sizes, {}, {}, {}, {}, 1, {}};
  check(call, false);
  std::vector<at::Tensor> outputs;
  for (const int64_t size : output_sizes) outputs.push_back(at::empty({call.samples(), size}, inputs[0].options()));
  call.outputs = outputs;
  const Sizes checked = sizes_of<Sizes>(sizes);
  if (call.samples()) Run(call, checked);
  return outputs;
}

// The op `chain_vjp`, likewise.
template <class Sizes, void (*Run)(const ChainCall&, const Sizes&)>
void chain_vjp(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables, const at::Tensor& forward,
               const at::Tensor& backward, at::IntArrayRef sizes, at::TensorList outputs,
               const std::optional<at::Tensor>& targets, const std::optional<at::Tensor>& seed_rows,
               at::TensorList cotangents, int64_t seed_tile, at::TensorList results) {
  const at::Tensor none;
  const ChainCall call{inputs,
                       packed,
                       tables,
                       forward,
                       backward,
                       sizes,
                       outputs,
                       targets.value_or(none),
                       seed_rows.value_or(none),
                       cotangents,
                       seed_tile,
                       results};
  check(call, true);
  const Sizes checked = sizes_of<Sizes>(sizes);
  if (call.samples()) Run(call, checked);
}

// The result of DeepLift's multipliers, [taps, N, C, oh, ow], not yet written.  `pool` is empty for a ReLU alone.
inline at::Tensor rescale_result(const at::Tensor& z, const at::Tensor& reference, at::IntArrayRef pool, bool relu) {
  check_rescale(z, reference, pool, relu);
  return pool.empty() ? at::empty({1, z.size(0), z.size(1), z.size(2), z.size(3)}, z.options())
                      : at::empty({pool[0] * pool[1], z.size(0), z.size(1), pool[8], pool[9]}, z.options());
}

// The operands of DeepLift's multipliers as a kernel reads them.
template <class T>
RescaleArgs<T> rescale_args(const at::Tensor& z, const at::Tensor& reference, at::IntArrayRef pool, bool relu,
                            double eps, at::Tensor& out) {
  const int64_t H = z.size(2), W = z.size(3);
  RescaleArgs<T> a{};
  a.z = z.const_data_ptr<T>();
  a.ref = reference.const_data_ptr<T>();
  a.out = out.mutable_data_ptr<T>();
  a.ref_rows = reference.size(0);
  a.channels = z.size(1);
  a.out_tap = out.numel() / out.size(0);
  a.pool = pool.empty()
               ? Pool{H, W, 1, 1, 1, 1, 0, 0, 1, 1, H, W}
               : Pool{H, W, pool[0], pool[1], pool[2], pool[3], pool[4], pool[5], pool[6], pool[7], pool[8], pool[9]};
  a.relu = relu;
  a.eps = static_cast<T>(eps);
  return a;
}

}  // namespace gradkern
