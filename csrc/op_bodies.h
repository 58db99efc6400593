// The bodies of the ops that every device shares: checks and allocations around a backend's kernels.
#pragma once

#include <optional>

#include "chain_call.h"
#include "checks.h"
#include "records.h"
#include "rescale_rule.h"

namespace gradkern {

// The op `chain_forward` of a backend, whose `Run` launches a checked, non-empty call.
template <class Sizes, void (*Run)(const ChainCall&, const Sizes&)>
Tensors chain_forward(const Tensors& inputs, const Tensor& packed, const Tensor& tables, const Tensor& forward,
                      const Ints& sizes, const Ints& output_sizes) {
  Tensors outputs;
  const Tensors none;
  const ChainCall call{inputs, packed, tables, forward, nullptr, outputs, nullptr, nullptr, none, 1, none};
  check(call, false);
  for (const int64_t size : output_sizes)
    outputs.push_back(torch::stable::new_empty(inputs[0], {call.samples(), size}));
  const Sizes checked = sizes_of<Sizes>(sizes);
  if (call.samples()) Run(call, checked);
  return outputs;
}

// The op `chain_vjp`, likewise.
template <class Sizes, void (*Run)(const ChainCall&, const Sizes&)>
void chain_vjp(const Tensors& inputs, const Tensor& packed, const Tensor& tables, const Tensor& forward,
               const Tensor& backward, const Ints& sizes, const Tensors& outputs, const std::optional<Tensor>& targets,
               const std::optional<Tensor>& seed_rows, const Tensors& cotangents, int64_t seed_tile,
               const Tensors& results) {
  const ChainCall call{inputs,
                       packed,
                       tables,
                       forward,
                       &backward,
                       outputs,
                       targets ? &*targets : nullptr,
                       seed_rows ? &*seed_rows : nullptr,
                       cotangents,
                       seed_tile,
                       results};
  check(call, true);
  const Sizes checked = sizes_of<Sizes>(sizes);
  if (call.samples()) Run(call, checked);
}

// Memory for DeepLift's multipliers, [taps, N, C, oh, ow].  `pool` is empty for a ReLU alone.
inline Tensor rescale_result(const Tensor& z, const Tensor& reference, const Ints& pool, bool relu) {
  check_rescale(z, reference, pool, relu);
  const bool alone = pool.empty();
  return torch::stable::new_empty(z, {alone ? 1 : pool[0] * pool[1], z.size(0), z.size(1), alone ? z.size(2) : pool[8],
                                      alone ? z.size(3) : pool[9]});
}

// The operands of DeepLift's multipliers as a kernel reads them.
template <class T>
RescaleArgs<T> rescale_args(const Tensor& z, const Tensor& reference, const Ints& pool, bool relu, double eps,
                            Tensor& out) {
  const int64_t H = z.size(2), W = z.size(3);
  RescaleArgs<T> a{};
  a.z = data<T>(z);
  a.ref = data<T>(reference);
  a.out = mutable_data<T>(out);
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
