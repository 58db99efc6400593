// Statistics of attributions over samples: the caller's tensors, checked.
#pragma once
#include "../torch_abi.h"

namespace gradkern {

// Statistics that rows of `size` numbers are added to: float64 [size] (float32 for `max`), and `group`, float64
// [G, size], to whose row groups[i] sample i is added.  An empty tensor stands for one that is not taken.
struct Statistics {
  const Tensor &sum, &square, &abs, &max, &group;
  const Tensor& groups;  // int64 [samples]

  // `sums`: the five statistics in the order of the fields, as the ops take them.
  Statistics(const Tensors& sums, const Tensor& groups, int64_t samples, int64_t size);
  // Adds rows [samples, ...] of the samples from `first` on.  `keep`: per sample, whether it counts; null: all count.
  // `grain`: numbers per thread.
  void add(const Tensor& rows, int64_t first, const uint8_t* keep, bool magnitude, int64_t grain) const;
};

}  // namespace gradkern
