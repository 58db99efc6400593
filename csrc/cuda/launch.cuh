// Launches without torch: the error text, or null.
#pragma once
#include "chain.cuh"
#include "launch.h"

namespace gradkern::cuda {

// Lets the kernel use as much shared memory as the current device gives a block.
template <class T, int Math>
const char* prepare_chain(int bytes) {
  return error_text(cudaFuncSetAttribute(chain_kernel<T, Math>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <class T, int Math>
const char* launch_chain(const Args<T>& args, int blocks, int threads, size_t shared, void* stream) {
  const auto kernel = chain_kernel<T, Math>;
  GK_LAUNCH(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, stream, args);
  return error_text(cudaGetLastError());
}

}  // namespace gradkern::cuda
