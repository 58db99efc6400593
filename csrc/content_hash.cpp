// The content hash on the CPU; a GPU's is in cuda/kernels.cu.
#include "content_hash.h"

#include <vector>

#include "cpu/isa.h"

namespace gradkern {

uint64_t hash_bytes(uint64_t total, const void* from, size_t size) {
  const ByteRange range{from, size};
  return current_isa().hash(total, &range, 1);
}

// A 64-bit hash of the live tensors' bytes: an edit of any kind goes unnoticed only if two contents have one hash.
int64_t content_hash(const Tensors& tensors) {
  std::vector<ByteRange> ranges;
  ranges.reserve(tensors.size());
  Tensors copies;
  for (const Tensor& tensor : tensors) {
    const bool plain = tensor.is_contiguous();
    if (!plain) copies.push_back(torch::stable::contiguous(tensor));
    const Tensor& t = plain ? tensor : copies.back();
    ranges.push_back({t.const_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size()});
  }
  return static_cast<int64_t>(current_isa().hash(0x9e3779b97f4a7c15ull, ranges.data(), ranges.size()));
}

}  // namespace gradkern
