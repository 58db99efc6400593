// Launches without torch: the error text, or null.
#pragma once
#include "chain.cuh"
#include "launch.h"

namespace gradkern::cuda {

// Lets the kernel use as much shared memory as the current device gives a block.
template <class T, int Math>
const char* prepare_chain(int bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(chain_kernel<T, Math>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T, int Math>
const char* launch_chain(const Args<T>& args, int blocks, int threads, size_t shared, void* stream) {
  chain_kernel<T, Math><<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gradkern::cuda
