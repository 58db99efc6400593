// Checks on what reaches a kernel, shared by every device; each failure says what was got and what was expected.
#pragma once
#include <ATen/ATen.h>

#include <cstring>

#include "records.h"
#include "rescale.h"

namespace gradkern {

// Records are of this version, and inputs, tables and weights belong together.
void check_chain(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables, const at::Tensor& forward,
                 const at::Tensor& backward);

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

// What a backward pass starts from, and what it fills.
void check_seeds(at::TensorList inputs, const at::Tensor& packed, at::TensorList outputs, const at::Tensor& targets,
                 const at::Tensor& seed_rows, at::TensorList cotangents, int64_t seed_tile, at::TensorList results);

// The result of DeepLift's multipliers, [taps, N, C, oh, ow], not yet written.  `pool` is empty for a ReLU alone.
at::Tensor rescaled(const at::Tensor& z, const at::Tensor& reference, at::IntArrayRef pool, bool relu);

// The same as a kernel reads it.
template <class T>
SharesArgs<T> shares_args(const at::Tensor& z, const at::Tensor& reference, at::IntArrayRef pool, bool relu, double eps,
                          at::Tensor& out) {
  const int64_t H = z.size(2), W = z.size(3);
  SharesArgs<T> a{};
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
