// The part of CUDA's runtime that the launchers call, on the host: attributes, launches with a GPU's limits, errors.
// There is one stand-in GPU.  The tests set its properties, and it records the requests.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "shim.h"

namespace gradkern::host {

// Plain integers, mirrored by tests/support/host_device.py.
struct Gpu {
  int processors, shared_bytes;
  int capturing;  // 1: a CUDA graph is being captured
  // The requests.
  int launches;
  int blocks;   // of the last launch
  int allowed;  // bytes of shared memory that a kernel was last allowed
  int guards;   // that are alive
  int loaded;   // kernels that have been loaded; lazily, at their first use, as on a GPU
};

}  // namespace gradkern::host

extern "C" gradkern::host::Gpu* gk_gpu();

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClockRate,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
struct cudaFuncAttributes {};
using dim3 = gradkern::host::Dim;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

namespace gradkern::host {

cudaError_t load(const void* kernel);
cudaError_t allow_shared(const void* kernel, int bytes);
// Whether a GPU would launch this; otherwise the error that `cudaGetLastError` then returns.
bool may_launch(const void* kernel, Dim grid, unsigned threads, size_t shared);

// Runs blocks one after the other, and the threads of a block at once.  The shared memory of every block starts as
// NaNs, so that a read of a number that was never written is noticed.
template <class Kernel>
void launch(Dim grid, unsigned threads, size_t bytes, const Kernel& kernel) {
  // Exactly as large as asked for, so that the address sanitizer sees one byte past it.
  const std::unique_ptr<unsigned char, void (*)(void*)> memory(
      static_cast<unsigned char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16)), std::free);
  unsigned char* const bottom = memory.get();
  std::vector<Warp> warps(threads / 32);
  Block block{bottom, bytes, Barrier(threads), warps.data()};
  std::vector<std::thread> running;
  for (unsigned i = 0; i < threads; ++i)
    running.emplace_back([&, i] {
      self = {&block, &warps[i / 32], i % 32};
      thread_index.x = i;
      block_size.x = threads;
      grid_size = grid;
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned b = 0; b < grid.x; ++b) {
          if (i == 0) std::memset(bottom, 0xff, bytes);
          __syncthreads();
          block_index = {b, 0, z};
          kernel();
          __syncthreads();
        }
    });
  for (std::thread& t : running) t.join();
}

}  // namespace gradkern::host

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return gradkern::host::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel* kernel) {
  return gradkern::host::load(reinterpret_cast<const void*>(kernel));
}

#define GK_LAUNCH(kernel, grid, threads, shared, stream, ...)                                    \
  do {                                                                                           \
    (void)(stream);                                                                              \
    const gradkern::host::Dim dim{grid};                                                         \
    if (gradkern::host::may_launch(reinterpret_cast<const void*>(kernel), dim, threads, shared)) \
      gradkern::host::launch(dim, threads, shared, [&] { kernel(__VA_ARGS__); });                \
  } while (false)
