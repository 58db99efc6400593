// Checks of an op's arguments, shared by every device; each failure says what was got and what was expected.
#pragma once

#include <cstring>

#include "chain_call.h"

namespace gradkern {

// Checks that records are of this version, that inputs, tables and weights fit together, and seeds and results too.
void check(const ChainCall& call, bool backward);

// A backend's sizes of scratch memory, CpuSizes or CudaSizes.
template <class Sizes>
Sizes sizes_of(const Ints& numbers) {
  constexpr size_t kCount = sizeof(Sizes) / sizeof(int64_t);
  GRADKERN_CHECK(numbers.size() == kCount, "gradkern: expected ", kCount, " sizes of scratch memory, got ",
                 numbers.size());
  for (const int64_t s : numbers) GRADKERN_CHECK(s >= 0, "gradkern: negative size of scratch memory: ", s);
  Sizes sizes;
  std::memcpy(&sizes, numbers.data(), sizeof sizes);
  return sizes;
}

// Checks the operands of DeepLift's multipliers; `pool` is empty for a ReLU alone.
void check_rescale(const Tensor& z, const Tensor& reference, const Ints& pool, bool relu);

}  // namespace gradkern
