// Checks on what reaches a kernel, shared by every device; each failure says what was got and what was expected.
#pragma once
#include <ATen/ATen.h>

namespace gradkern {

// The records fit the arena, and inputs, tables and weights belong together.
void check_chain(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables, const at::Tensor& forward,
                 const at::Tensor& backward, at::IntArrayRef sizes);

// What a backward pass starts from, and what it fills.
void check_seeds(at::TensorList inputs, const at::Tensor& packed, at::TensorList outputs, const at::Tensor& targets,
                 const at::Tensor& seed_rows, at::TensorList cotangents, int64_t seed_tile, at::TensorList results);

// An order-sensitive hash of the bytes of CPU tensors.
int64_t content_hash(at::TensorList tensors);

}  // namespace gradkern
