// The kernels, in single and double precision, and their launches.
#include "chain.cuh"
#include "rescale.cuh"

namespace gradkern::cuda {

template <class T>
const char* launch_chain(const Args<T>& args, int blocks, int threads, size_t shared, int most, void* stream) {
  const auto kernel = chain_kernel<T>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error_text(error);
  GK_LAUNCH(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, stream, args);
  return error_text(cudaGetLastError());
}

template const char* launch_chain<float>(const Args<float>&, int, int, size_t, int, void*);
template const char* launch_chain<double>(const Args<double>&, int, int, size_t, int, void*);

template <class T>
const char* launch_rescale(const RescaleArgs<T>& args, int64_t windows, bool pooled, void* stream) {
  const int64_t wanted = (windows + kRescaleThreads - 1) / kRescaleThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < 16384 ? wanted : 16384),
                 count = static_cast<unsigned>(windows);
  const auto kernel = !pooled ? secant_kernel<T> : args.relu ? rescale_kernel<T, true> : rescale_kernel<T, false>;
  GK_LAUNCH(kernel, blocks, kRescaleThreads, 0, stream, args, count);
  return error_text(cudaGetLastError());
}

template const char* launch_rescale<float>(const RescaleArgs<float>&, int64_t, bool, void*);
template const char* launch_rescale<double>(const RescaleArgs<double>&, int64_t, bool, void*);

// The sum of the words' hashes, each mixed with its place.  A change of a word or of their order changes it, but the
// order in which threads add does not.
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

const char* launch_hash(const uint32_t* words, int64_t count, uint64_t first, unsigned long long* total, void* stream) {
  const int64_t wanted = (count + 8 * kHashThreads - 1) / (8 * kHashThreads);
  const unsigned blocks = static_cast<unsigned>(wanted < 1024 ? wanted : 1024);
  GK_LAUNCH(hash_kernel, blocks, kHashThreads, 0, stream, words, count, first, total);
  return error_text(cudaGetLastError());
}

const char* load_kernels() {
  cudaFuncAttributes unread;
  cudaError_t error = cudaSuccess;
  const auto load = [&](const auto kernel) {
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&unread, kernel);
  };
  load(chain_kernel<float>), load(chain_kernel<double>), load(hash_kernel);
  load(secant_kernel<float>), load(secant_kernel<double>);
  load(rescale_kernel<float, true>), load(rescale_kernel<float, false>);
  load(rescale_kernel<double, true>), load(rescale_kernel<double, false>);
  return error_text(error);
}

}  // namespace gradkern::cuda
