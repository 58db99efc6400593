// The arguments of a chain's launch: plain data, shared by the kernels, their launchers and the host shim.
#pragma once
#include <cstdint>

#include "../program.h"

namespace gradkern::cuda {

constexpr int kPorts = 16;  // external inputs or outputs of a chain; gradkern/codegen/cuda/lowering.py: MAX_PORTS
// Threads of a block on a GPU: registers are handed out to warps in fours, so 9 to 12 warps get 168 each and spill; 8
// get 255.  gradkern/codegen/cuda/lowering.py: Device.threads.
constexpr int kThreads = 256;

// Arena of a block, in elements: `region` (scratch of a few samples at a time, or the temporary matrices of a block
// op), then `block` records of `sample` elements, then `block` records of `bits` bytes.  A record's negative sample
// stride means scratch: so far per slot.
template <class T>
struct Args {
  const Op* forward;
  const Op* backward;
  const T* packed;
  const int32_t* tables;
  const T* inputs[kPorts];
  T* outputs[kPorts];
  const T* cotangents[kPorts];
  T* results[kPorts];
  const int64_t* targets;
  const T* seed_rows;
  int64_t target_n;  // 0 where all samples share the targets
  int64_t seed_rows_n, seed_rows_s;
  int64_t samples;
  int forward_count, backward_count;
  int seeds, seed_tile;
  int region, sample, bits;
  int block;    // samples of a tile in this launch
  int planned;  // samples that the arena has room for
};

}  // namespace gradkern::cuda
