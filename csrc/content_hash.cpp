// The content hash on the CPU; a GPU's is in cuda/kernels.cu.
#include "content_hash.h"

#include <cstring>

namespace gradkern {

uint64_t hash_bytes(uint64_t total, const void* from, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  // Eight independent lanes of multiply-rotate keep the multiplier busy; each step is a bijection of its lane
  // for a fixed word, so one changed word always changes the hash of its lane.
  uint64_t lane[8];
  for (int l = 0; l < 8; ++l) lane[l] = total + 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(l + 1);
  size_t i = 0;
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
  return total;
}

// Notices every kind of edit of packed weights.
int64_t content_hash(const Tensors& tensors) {
  uint64_t total = 0x9e3779b97f4a7c15ull;
  for (const Tensor& tensor : tensors) {
    const Tensor t = torch::stable::contiguous(tensor);
    total =
        hash_bytes(total, t.const_data_ptr(), static_cast<size_t>(t.numel() * static_cast<int64_t>(t.element_size())));
  }
  return static_cast<int64_t>(total);
}

}  // namespace gradkern
