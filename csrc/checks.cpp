// Checks of an op's arguments on every device.  What a CPU's records refer to is checked in cpu/check_records.cpp.
#include "checks.h"

#include "records.h"

namespace gradkern {

namespace {

void check_operands(const ChainCall& call) {
  GRADKERN_CHECK(!call.inputs.empty(), "gradkern: a chain needs at least one input, got none");
  const Tensor &packed = call.packed, &tables = call.tables;
  const int64_t n = call.samples();
  for (const Tensor& x : call.inputs) {
    GRADKERN_CHECK(x.is_contiguous(), "gradkern: chain inputs must be contiguous, got strides ", x.strides());
    GRADKERN_CHECK(x.scalar_type() == packed.scalar_type(), "gradkern: chain inputs are ", x.scalar_type(),
                   " but the packed weights are ", packed.scalar_type(), "; bind the model again");
    GRADKERN_CHECK(x.size(0) == n, "gradkern: chain inputs disagree on the batch: ", x.size(0), " and ", n);
    GRADKERN_CHECK(x.device() == packed.device(), "gradkern: an input is on ", x.device(), ", the weights on ",
                   packed.device());
  }
  GRADKERN_CHECK(call.single() || packed.scalar_type() == ScalarType::Double,
                 "gradkern: the kernels take float32 or float64, got ", packed.scalar_type());
  GRADKERN_CHECK(packed.is_contiguous() && tables.is_contiguous() && tables.scalar_type() == ScalarType::Int &&
                     tables.device() == packed.device(),
                 "gradkern: packed weights and tables must be contiguous and on one device, tables int32");
  for (const Tensor* records : {&call.forward, call.backward}) {
    if (!records) continue;
    GRADKERN_CHECK(records->scalar_type() == ScalarType::Long && records->is_contiguous() &&
                       records->device() == packed.device() && records->dim() == 2 && records->size(1) == kRecordWidth,
                   "gradkern: records must be a contiguous int64 tensor on the weights' device, [records, ",
                   kRecordWidth, "], got ", records->sizes(),
                   "; this extension and the Python package are of different versions");
  }
}

void check_targets(const ChainCall& call) {
  const Tensor &targets = *call.targets, &packed = call.packed;
  const int64_t n = call.samples();
  GRADKERN_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous() &&
                     targets.device() == packed.device() &&
                     (targets.dim() == 1 || (targets.dim() == 2 && targets.size(0) == n)),
                 "gradkern: targets must be contiguous int64 on the weights' device, [S] or [", n, ", S], got ",
                 targets.scalar_type(), " ", targets.sizes());
  GRADKERN_CHECK(call.outputs.size() == 1, "gradkern: targets need one output, got ", call.outputs.size());
  // Targets on a GPU are not checked: reading them would wait for it.
  const int64_t* t = data<int64_t>(targets);
  const int64_t size = call.outputs[0].size(1);
  for (int64_t i = 0; targets.device().is_cpu() && i < targets.numel(); ++i)
    GRADKERN_CHECK_INDEX(t[i] >= 0 && t[i] < size, "gradkern: target ", t[i], " is out of range, expected 0 … ",
                         size - 1);
}

// Seeds are targets (with rows of the last weight, or not) or dense cotangents; there is one result per wanted input.
void check_seeds(const ChainCall& call) {
  const Tensor *targets = call.targets, *rows = call.seed_rows, &packed = call.packed;
  const Tensors &outputs = call.outputs, &cotangents = call.cotangents;
  const int64_t n = call.samples();
  const auto dtype = packed.scalar_type();
  for (const Tensor& y : outputs)
    GRADKERN_CHECK(y.is_contiguous() && y.scalar_type() == dtype && y.dim() == 2 && y.size(0) == n,
                   "gradkern: outputs must be contiguous ", dtype, " [", n, ", size], got ", y.scalar_type(), " ",
                   y.sizes());
  GRADKERN_CHECK(call.seed_tile > 0, "gradkern: seed_tile must be positive, got ", call.seed_tile);
  GRADKERN_CHECK((targets != nullptr) == cotangents.empty(), "gradkern: give targets or cotangents, one of them");
  if (targets) check_targets(call);
  if (rows)
    GRADKERN_CHECK(
        targets && rows->is_contiguous() && rows->scalar_type() == dtype && rows->device() == packed.device() &&
            rows->dim() == targets->dim() + 1 && rows->sizes().slice(0, targets->dim()).equals(targets->sizes()),
        "gradkern: seed_rows must be contiguous ", dtype, " on ", packed.device(),
        ", [S, K] or [N, S, K] beside targets, got ", rows->scalar_type(), " ", rows->sizes(), " on ", rows->device());
  GRADKERN_CHECK(cotangents.empty() || cotangents.size() == outputs.size(), "gradkern: expected ", outputs.size(),
                 " cotangents, one per output, got ", cotangents.size());
  const int64_t seeds = targets ? targets->size(-1) : cotangents[0].dim() == 3 ? cotangents[0].size(1) : -1;
  for (size_t i = 0; i < cotangents.size(); ++i) {
    const Tensor& g = cotangents[i];
    GRADKERN_CHECK(g.is_contiguous() && g.scalar_type() == dtype && g.dim() == 3 && g.size(0) == n &&
                       g.size(1) == seeds && g.size(2) == outputs[i].size(1),
                   "gradkern: cotangents must be contiguous ", dtype, " [", n, ", S, ", outputs[i].size(1), "], got ",
                   g.scalar_type(), " ", g.sizes());
  }
  for (const Tensor& r : call.results)
    GRADKERN_CHECK(
        r.is_contiguous() && r.scalar_type() == dtype && r.dim() >= 2 && r.size(0) == n && r.size(1) == seeds,
        "gradkern: results must be contiguous ", dtype, " [", n, ", ", seeds, ", …], got ", r.scalar_type(), " ",
        r.sizes());
  for (const Tensors* list : {&outputs, &cotangents, &call.results})
    for (const Tensor& t : *list)
      GRADKERN_CHECK(t.device() == packed.device(), "gradkern: expected all tensors on ", packed.device(),
                     ", got one on ", t.device());
}

}  // namespace

void check(const ChainCall& call, bool backward) {
  check_operands(call);
  if (backward) check_seeds(call);
}

void check_rescale(const Tensor& z, const Tensor& reference, const Ints& pool, bool relu) {
  GRADKERN_CHECK(z.dim() == 4 && reference.dim() == 4 && z.is_contiguous() && reference.is_contiguous(),
                 "gradkern: rescale takes contiguous [N, C, H, W], got ", z.sizes(), " and ", reference.sizes());
  GRADKERN_CHECK(z.scalar_type() == reference.scalar_type() && z.sizes().slice(1).equals(reference.sizes().slice(1)) &&
                     (reference.size(0) == 1 || reference.size(0) == z.size(0)),
                 "gradkern: rescale's reference must have one row or as many as z, and its shape and dtype, got ",
                 reference.scalar_type(), " ", reference.sizes(), " for ", z.scalar_type(), " ", z.sizes());
  GRADKERN_CHECK(z.device() == reference.device(), "gradkern: rescale: z is on ", z.device(), ", its reference on ",
                 reference.device());
  GRADKERN_CHECK(z.scalar_type() == ScalarType::Float || z.scalar_type() == ScalarType::Double,
                 "gradkern: rescale takes float32 or float64, got ", z.scalar_type());
  GRADKERN_CHECK(pool.empty() ? relu : pool.size() == 10,
                 "gradkern: rescale without a pool is a ReLU's; a pool is 10 ints");
  for (size_t i = 0; i < pool.size(); ++i)
    GRADKERN_CHECK(pool[i] >= (i == 4 || i == 5 ? 0 : 1), "gradkern: rescale's pool has ", pool[i], " in place ", i);
}

}  // namespace gradkern
