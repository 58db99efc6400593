// Schemas of the tensor ops, except `accumulate` (cpu/statistics.cpp) and the recurrent ones (cpu/recurrent.cpp).

#include "content_hash.h"

namespace gradkern {

STABLE_TORCH_LIBRARY(gradkern, m) {
  // Forward of a chain: one result per external output, each [N, size].
  m.def(
      "chain_forward(Tensor[] inputs, Tensor packed, Tensor tables, Tensor forward, int[] sizes, "
      "int[] output_sizes) -> Tensor[]");
  // The forward and the backward of all seeds in one call.  `targets` are flat output indices, [S] or [N, S];
  // `seed_rows` are the last weight's rows (empty if the net does not end in one); `cotangents` are dense seeds [N, S,
  // size] per external output.  `outputs` [N, size] and `results` [N, S, size] per wanted input are written in place,
  // because torch.compile functionalizes an op that writes and returns nothing, but not one that also returns a list.
  m.def(
      "chain_vjp(Tensor[] inputs, Tensor packed, Tensor tables, Tensor forward, Tensor backward, int[] sizes, "
      "Tensor(a!)[] outputs, Tensor? targets, Tensor? seed_rows, Tensor[] cotangents, int seed_tile, "
      "Tensor(b!)[] results) -> ()");
  // DeepLift's multipliers of a ReLU (`pool` empty), a max pool, or a ReLU and the pool after it: [taps, N, C, oh, ow]
  // for z [N, C, H, W] and a reference [N or 1, C, H, W]; `pool`: kernel, stride, padding before, dilation, output, in
  // pairs.  Without a pool [1, N, C, H, W].
  m.def("rescale(Tensor z, Tensor reference, int[] pool, bool relu, float eps) -> Tensor");
  m.def("content_hash(Tensor[] tensors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) { m.impl("content_hash", TORCH_BOX(&content_hash)); }

}  // namespace gradkern
