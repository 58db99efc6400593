// Checks on what reaches a kernel, shared by every device; each failure says what was got and what was expected.
#pragma once
#include <ATen/ATen.h>

#include <cstring>
#include <optional>
#include <vector>

#include "records.h"
#include "rescale.h"

namespace gradkern {

// A call of a chain: forward, or forward and the backward of all seeds.
struct ChainCall {
  at::TensorList inputs;
  const at::Tensor& packed;
  const at::Tensor& tables;
  const at::Tensor& forward;  // records
  at::Tensor backward;        // none of a forward call
  at::IntArrayRef sizes;
  at::TensorList outputs;         // [N, size]
  at::Tensor targets, seed_rows;  // [S] or [N, S], and the last weight's rows [*targets, K]; undefined without
  at::TensorList cotangents;      // [N, S, size] per output, where there are no targets
  int64_t seed_tile;
  at::TensorList results;  // [N, S, size]

  int64_t samples() const { return inputs[0].size(0); }
  int64_t seeds() const {
    return backward.size(0) == 0 ? 0 : targets.defined() ? targets.size(-1) : cotangents[0].size(1);
  }
  bool single() const { return packed.scalar_type() == at::kFloat; }
  // What a kernel's arguments of either device say of the seeds.
  template <class T, class Args>
  void describe_seeds(Args& args) const {
    if (targets.defined()) {
      args.targets = targets.const_data_ptr<int64_t>();
      args.target_n = targets.dim() == 2 ? seeds() : 0;
    }
    if (seed_rows.defined()) {
      args.seed_rows = seed_rows.const_data_ptr<T>();
      args.seed_rows_s = seed_rows.size(-1);
      args.seed_rows_n = seed_rows.dim() == 3 ? seeds() * args.seed_rows_s : 0;
    }
  }
};

// Records are of this version; inputs, tables and weights belong together, and so do seeds and results.
void check(const ChainCall& call, bool backward);

// A backend's sizes of scratch memory: CpuSizes, CudaSizes.
template <class Sizes>
Sizes sizes_of(at::IntArrayRef numbers) {
  constexpr size_t kCount = sizeof(Sizes) / sizeof(int64_t);
  TORCH_CHECK(numbers.size() == kCount, "gradkern: expected ", kCount, " sizes of scratch memory, got ",
              numbers.size());
  for (const int64_t s : numbers) TORCH_CHECK(s >= 0, "gradkern: negative size of scratch memory: ", s);
  Sizes sizes;
  std::memcpy(&sizes, numbers.data(), sizeof sizes);
  return sizes;
}

// The op `chain_forward` of a backend whose `Run` launches a call that is checked and not empty.
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

// Likewise `chain_vjp`.
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
at::Tensor rescaled(const at::Tensor& z, const at::Tensor& reference, at::IntArrayRef pool, bool relu);

// The same as a kernel reads it.
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

// An order-sensitive hash of the bytes of CPU tensors.
int64_t content_hash(at::TensorList tensors);

}  // namespace gradkern
