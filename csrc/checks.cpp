// Every check on what reaches a kernel, and the hash of tensors on the CPU.
#include "checks.h"

#include <ATen/ATen.h>

#include <cstring>
#include <vector>

namespace gradkern {

void check_chain(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables, const at::Tensor& forward,
                 const at::Tensor& backward) {
  TORCH_CHECK(!inputs.empty(), "gradkern: a chain needs at least one input, got none");
  const int64_t n = inputs[0].size(0);
  for (const at::Tensor& x : inputs) {
    TORCH_CHECK(x.is_contiguous(), "gradkern: chain inputs must be contiguous, got strides ", x.strides());
    TORCH_CHECK(x.scalar_type() == packed.scalar_type(), "gradkern: chain inputs are ", x.scalar_type(),
                " but the packed weights are ", packed.scalar_type(), "; bind the model again");
    TORCH_CHECK(x.size(0) == n, "gradkern: chain inputs disagree on the batch: ", x.size(0), " and ", n);
    TORCH_CHECK(x.device() == packed.device(), "gradkern: an input is on ", x.device(), ", the weights on ",
                packed.device());
  }
  TORCH_CHECK(packed.is_contiguous() && tables.is_contiguous() && tables.scalar_type() == at::kInt &&
                  tables.device() == packed.device(),
              "gradkern: packed weights and tables must be contiguous and on one device, tables int32");
  for (const at::Tensor* ops : {&forward, &backward}) {
    TORCH_CHECK(ops->scalar_type() == at::kLong && ops->is_contiguous() && ops->device() == packed.device() &&
                    ops->dim() == 2 && ops->size(1) == kRecordWidth,
                "gradkern: records must be a contiguous int64 tensor on the weights' device, [ops, ", kRecordWidth,
                "], got ", ops->sizes(), "; this extension and the Python package are of different versions");
  }
}

// What goes in and out of a backward pass: seeds as targets (with rows of the last weight, or not) or as dense
// cotangents, one result per wanted input.
void check_seeds(at::TensorList inputs, const at::Tensor& packed, at::TensorList outputs, const at::Tensor& targets,
                 const at::Tensor& seed_rows, at::TensorList cotangents, int64_t seed_tile, at::TensorList results) {
  const int64_t n = inputs[0].size(0);
  const auto dtype = packed.scalar_type();
  std::vector<int64_t> output_sizes;
  for (const at::Tensor& y : outputs) {
    TORCH_CHECK(y.is_contiguous() && y.scalar_type() == dtype && y.dim() == 2 && y.size(0) == n,
                "gradkern: outputs must be contiguous ", dtype, " [", n, ", size], got ", y.scalar_type(), " ",
                y.sizes());
    output_sizes.push_back(y.size(1));
  }
  TORCH_CHECK(seed_tile > 0, "gradkern: seed_tile must be positive, got ", seed_tile);
  TORCH_CHECK(targets.defined() != !cotangents.empty(), "gradkern: give targets or cotangents, one of them");
  if (targets.defined()) {
    TORCH_CHECK(targets.scalar_type() == at::kLong && targets.is_contiguous() && targets.device() == packed.device() &&
                    (targets.dim() == 1 || (targets.dim() == 2 && targets.size(0) == n)),
                "gradkern: targets must be contiguous int64 on the weights' device, [S] or [", n, ", S], got ",
                targets.scalar_type(), " ", targets.sizes());
    TORCH_CHECK(output_sizes.size() == 1, "gradkern: targets need one output, got ", output_sizes.size());
    // A GPU's targets are not looked at: that would wait for it.
    const int64_t* t = targets.const_data_ptr<int64_t>();
    for (int64_t i = 0; targets.device().is_cpu() && i < targets.numel(); ++i)
      TORCH_CHECK_INDEX(t[i] >= 0 && t[i] < output_sizes[0], "gradkern: target ", t[i],
                        " is out of range, expected 0 … ", output_sizes[0] - 1);
  }
  if (seed_rows.defined())
    TORCH_CHECK(targets.defined() && seed_rows.is_contiguous() && seed_rows.scalar_type() == dtype &&
                    seed_rows.device() == packed.device() && seed_rows.dim() == targets.dim() + 1 &&
                    seed_rows.sizes().slice(0, targets.dim()) == targets.sizes(),
                "gradkern: seed_rows must be contiguous ", dtype, " on ", packed.device(),
                ", [S, K] or [N, S, K] beside targets, got ", seed_rows.scalar_type(), " ", seed_rows.sizes(), " on ",
                seed_rows.device());
  TORCH_CHECK(cotangents.empty() || cotangents.size() == output_sizes.size(), "gradkern: expected ",
              output_sizes.size(), " cotangents, one per output, got ", cotangents.size());
  const int64_t seeds = targets.defined() ? targets.size(-1) : cotangents[0].dim() == 3 ? cotangents[0].size(1) : -1;
  for (size_t i = 0; i < cotangents.size(); ++i) {
    const at::Tensor& g = cotangents[i];
    TORCH_CHECK(g.is_contiguous() && g.scalar_type() == dtype && g.sizes().equals({n, seeds, output_sizes[i]}),
                "gradkern: cotangents must be contiguous ", dtype, " [", n, ", S, ", output_sizes[i], "], got ",
                g.scalar_type(), " ", g.sizes());
  }
  for (const at::Tensor& r : results)
    TORCH_CHECK(r.is_contiguous() && r.scalar_type() == dtype && r.dim() >= 2 && r.size(0) == n && r.size(1) == seeds,
                "gradkern: results must be contiguous ", dtype, " [", n, ", ", seeds, ", …], got ", r.scalar_type(),
                " ", r.sizes());
}

at::Tensor rescaled(const at::Tensor& z, const at::Tensor& reference, at::IntArrayRef pool, bool relu) {
  TORCH_CHECK(z.dim() == 4 && reference.dim() == 4 && z.is_contiguous() && reference.is_contiguous(),
              "gradkern: rescale takes contiguous [N, C, H, W], got ", z.sizes(), " and ", reference.sizes());
  TORCH_CHECK(z.scalar_type() == reference.scalar_type() && z.sizes().slice(1) == reference.sizes().slice(1) &&
                  (reference.size(0) == 1 || reference.size(0) == z.size(0)),
              "gradkern: rescale's reference must have one row or as many as z, and its shape and dtype, got ",
              reference.scalar_type(), " ", reference.sizes(), " for ", z.scalar_type(), " ", z.sizes());
  TORCH_CHECK(z.device() == reference.device(), "gradkern: rescale: z is on ", z.device(), ", its reference on ",
              reference.device());
  TORCH_CHECK(z.scalar_type() == at::kFloat || z.scalar_type() == at::kDouble,
              "gradkern: rescale takes float32 or float64, got ", z.scalar_type());
  TORCH_CHECK(pool.empty() ? relu : pool.size() == 10,
              "gradkern: rescale without a pool is a ReLU's; a pool is 10 ints");
  for (size_t i = 0; i < pool.size(); ++i)
    TORCH_CHECK(pool[i] >= (i == 4 || i == 5 ? 0 : 1), "gradkern: rescale's pool has ", pool[i], " in place ", i);
  return pool.empty() ? at::empty({1, z.size(0), z.size(1), z.size(2), z.size(3)}, z.options())
                      : at::empty({pool[0] * pool[1], z.size(0), z.size(1), pool[8], pool[9]}, z.options());
}

// An order-sensitive hash of the bytes of all tensors: what guards packed weights against every kind of edit.
int64_t content_hash(at::TensorList tensors) {
  uint64_t total = 0x9e3779b97f4a7c15ull;
  for (const at::Tensor& tensor : tensors) {
    const at::Tensor t = tensor.contiguous();
    const auto* bytes = static_cast<const uint8_t*>(t.const_data_ptr());
    const int64_t size = static_cast<int64_t>(t.nbytes());
    // Eight independent lanes of multiply-rotate keep the multiplier busy; each step is a bijection of its lane
    // for a fixed word, so one changed word always changes the hash of its lane.
    uint64_t lane[8];
    for (int l = 0; l < 8; ++l) lane[l] = total + 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(l + 1);
    int64_t i = 0;
    for (; i + 64 <= size; i += 64)
      for (int l = 0; l < 8; ++l) {
        uint64_t word;
        std::memcpy(&word, bytes + i + 8 * l, 8);
        lane[l] = (((lane[l] ^ word) * 0xff51afd7ed558ccdull) << 31 | ((lane[l] ^ word) * 0xff51afd7ed558ccdull) >> 33);
      }
    for (; i < size; ++i) lane[0] = (lane[0] ^ bytes[i]) * 0x100000001b3ull;
    total ^= static_cast<uint64_t>(size) * 0xc2b2ae3d27d4eb4full;
    for (int l = 0; l < 8; ++l) {
      total = (total ^ lane[l]) * 0xc4ceb9fe1a85ec53ull;
      total ^= total >> 29;
    }
  }
  return static_cast<int64_t>(total);
}

}  // namespace gradkern
