// Statistics of attributions over samples: the caller's tensors, checked.
#pragma once
#include <optional>

#include "../torch_abi.h"

namespace gradkern {

// Sums that rows of `size` numbers are added to, all optional: float64 [size] (float32 for `max`), and float64
// [G, size] for `group`, of which sample i goes to row groups[i].
struct Statistics {
  const std::optional<Tensor>&sum, &square, &abs, &max, &group;
  const Tensor& groups;  // int64 [samples]

  void check(int64_t samples, int64_t size) const;
  // Adds rows [samples, ...], which are the samples from `first` on.  `keep`: per sample, whether it counts; or null.
  // `grain`: numbers per thread.
  void add(const Tensor& rows, int64_t first, const uint8_t* keep, bool magnitude, int64_t grain) const;
};

}  // namespace gradkern
