// The content hash on the GPU.
#include "hash.cuh"
#include "hash.h"

namespace gradkern::cuda {

const char* launch_hash(const uint32_t* words, int64_t count, uint64_t first, unsigned long long* total, void* stream) {
  const int64_t wanted = (count + 8 * kHashThreads - 1) / (8 * kHashThreads);
  const unsigned blocks = static_cast<unsigned>(wanted < 1024 ? wanted : 1024);
  GK_LAUNCH(hash_kernel, blocks, kHashThreads, 0, stream, words, count, first, total);
  return error_text(cudaGetLastError());
}

}  // namespace gradkern::cuda
