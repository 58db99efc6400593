// The launches: the interface between the launchers, which know torch, and the kernels, which do not.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../records.h"
#include "../rescale_rule.h"

namespace gradkern::cuda {

// Threads of a block on a GPU.  Registers are allotted to groups of four warps, so 9 to 12 warps get 168 each and
// spill, and 8 get 255.  gradkern/codegen/machine.py: Device.threads.
constexpr int kThreads = 256;

// Shared memory of a block, in elements: `workspace` (scratch for a few samples at a time, or the temporary matrices of
// a record that takes the whole block), then `sample` elements of each sample that the block has room for, then the
// bits, `bits` bytes per sample.
template <class T>
struct Args {
  const Record* forward;
  const Record* backward;
  const T* packed;
  const int32_t* tables;
  const T* inputs[kPorts];
  T* outputs[kPorts];
  const T* cotangents[kPorts];
  T* results[kPorts];
  const int64_t* targets;
  const T* seed_rows;
  int64_t target_n;  // 0 if all samples share the targets
  int64_t seed_rows_n, seed_rows_s;
  int64_t samples;
  int forward_count, backward_count;
  int seeds, seed_tile;
  int workspace, sample, bits;
  int block;    // samples of a tile in this launch
  int planned;  // samples that the block has room for
};

// Loads every kernel on the current device.  Returns the error text, or null.
const char* load_kernels();

// Launches the chain kernel with `shared` bytes of shared memory, and lets it have up to `most` at any launch.  Returns
// the error text, or null.
template <class T>
const char* launch_chain(const Args<T>& args, int blocks, int threads, size_t shared, int most, void* stream);

// `windows`: results per place of a window, below 2^31.  `pooled`: a max pool's multipliers, else a ReLU's secants. The
// error text, or null.
template <class T>
const char* launch_rescale(const RescaleArgs<T>& args, int64_t windows, bool pooled, void* stream);

// Adds the words' hashes, each mixed with its place from `first` on, to `*total`.  Returns the error text, or null.
const char* launch_hash(const uint32_t* words, int64_t count, uint64_t first, unsigned long long* total, void* stream);

}  // namespace gradkern::cuda
