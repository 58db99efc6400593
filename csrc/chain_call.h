// The arguments of a chain's ops, on every device.
#pragma once
#include <ATen/ATen.h>

namespace gradkern {

// A call of a chain: forward, or forward and the backward of all seeds.
struct ChainCall {
  at::TensorList inputs;
  const at::Tensor& packed;
  const at::Tensor& tables;
  const at::Tensor& forward;  // records
  at::Tensor backward;        // undefined in a forward call
  at::IntArrayRef sizes;
  at::TensorList outputs;         // [N, size]
  at::Tensor targets, seed_rows;  // [S] or [N, S], and the last weight's rows [*targets, K]; undefined without
  at::TensorList cotangents;      // [N, S, size] per output, if there are no targets
  int64_t seed_tile;
  at::TensorList results;  // [N, S, size]

  int64_t samples() const { return inputs[0].size(0); }
  int64_t seeds() const {
    return backward.size(0) == 0 ? 0 : targets.defined() ? targets.size(-1) : cotangents[0].size(1);
  }
  bool single() const { return packed.scalar_type() == at::kFloat; }
  // Fills in the seeds in a kernel's arguments, for either device.
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

}  // namespace gradkern
