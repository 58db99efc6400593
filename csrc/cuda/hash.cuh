// The sum of the words' hashes, each mixed with its place.  A change of a word or of their order changes it, but the
// order in which threads add does not.
#pragma once
#include "device.cuh"

namespace gradkern::cuda {

constexpr int kHashThreads = 256;

// The finalizer of SplitMix64.
GK_DEVICE uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

GK_KERNEL(kHashThreads, 1)
hash_kernel(const uint32_t* words, int64_t count, uint64_t first, unsigned long long* total) {
  uint64_t sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    // Mixed twice, so that changes of a place and of a word do not cancel.
    sum += mixed(mixed((first + static_cast<uint64_t>(i)) * 0x9e3779b97f4a7c15ull) + words[i]);
  }
  atomicAdd(total, static_cast<unsigned long long>(sum));
}

}  // namespace gradkern::cuda
