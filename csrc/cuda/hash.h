// A hash of tensors' contents on the GPU, which guards packed weights without copying them to the host.
#pragma once
#include <cstdint>

namespace gradkern::cuda {

// Adds the words' hashes, each mixed with its place from `first` on, to `*total`.  Returns the error text, or null.
const char* launch_hash(const uint32_t* words, int64_t count, uint64_t first, unsigned long long* total, void* stream);

}  // namespace gradkern::cuda
