// The arguments of a chain's ops, on every device.
#pragma once
#include <optional>

#include "torch_abi.h"

namespace gradkern {

// A call of a chain: forward, or forward and the backward of all seeds.
struct ChainCall {
  const Tensors& inputs;
  const Tensor& packed;
  const Tensor& tables;
  const Tensor& forward;      // records
  const Tensor* backward;     // null in a forward call
  const Tensors& outputs;     // [N, size]
  const Tensor* targets;      // [S] or [N, S], or null
  const Tensor* seed_rows;    // the last weight's rows [*targets, K], or null
  const Tensors& cotangents;  // [N, S, size] per output, if there are no targets
  int64_t seed_tile;
  const Tensors& results;  // [N, S, size]

  int64_t samples() const { return inputs[0].size(0); }
  int64_t seeds() const {
    return !backward || backward->size(0) == 0 ? 0 : targets ? targets->size(-1) : cotangents[0].size(1);
  }
  bool single() const { return packed.scalar_type() == ScalarType::Float; }
  // Sets the seeds in a kernel's arguments, on either device.
  template <class T, class Args>
  void describe_seeds(Args& args) const {
    if (targets) {
      args.targets = data<int64_t>(*targets);
      args.target_n = targets->dim() == 2 ? seeds() : 0;
    }
    if (seed_rows) {
      args.seed_rows = data<T>(*seed_rows);
      args.seed_rows_s = seed_rows->size(-1);
      args.seed_rows_n = seed_rows->dim() == 3 ? seeds() * args.seed_rows_s : 0;
    }
  }
};

}  // namespace gradkern
