// The chain kernel in single and double precision.
#include "chain.cuh"

namespace gradkern::cuda {

template <class T>
const char* prepare_chain(int bytes) {
  return error_text(cudaFuncSetAttribute(chain_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <class T>
const char* launch_chain(const Args<T>& args, int blocks, int threads, size_t shared, void* stream) {
  const auto kernel = chain_kernel<T>;
  GK_LAUNCH(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared, stream, args);
  return error_text(cudaGetLastError());
}

template const char* prepare_chain<float>(int);
template const char* prepare_chain<double>(int);
template const char* launch_chain<float>(const Args<float>&, int, int, size_t, void*);
template const char* launch_chain<double>(const Args<double>&, int, int, size_t, void*);

}  // namespace gradkern::cuda
