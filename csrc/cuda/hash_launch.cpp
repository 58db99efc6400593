// CUDA launch of the content hash.
#include <vector>

#include "../content_hash.h"
#include "hash.h"
#include "torch_cuda.h"

namespace gradkern::cuda {

namespace {

void succeed(cudaError_t error) {
  GRADKERN_CHECK(error == cudaSuccess, "gradkern: content_hash: ", cudaGetErrorString(error));
}

// The one call that waits for the GPU: it copies eight bytes to the host.
int64_t hash(const Tensors& tensors) {
  if (tensors.empty()) return content_hash({});
  const DeviceGuard guard(tensors[0]);
  const cudaStream_t stream = current_stream(tensors[0].get_device_index());
  const Tensor total = torch::stable::new_zeros(tensors[0], {1}, ScalarType::Long);
  auto* const sum = mutable_data<unsigned long long>(total);
  Tensors alive;  // until the copy below has waited for the kernels that read them
  uint64_t first = 1;
  for (const Tensor& tensor : tensors) {
    GRADKERN_CHECK(tensor.device() == tensors[0].device(), "gradkern: content_hash: tensors on ", tensors[0].device(),
                   " and on ", tensor.device());
    Tensor bytes = torch::stable::contiguous(tensor);
    int64_t size = bytes.numel() * static_cast<int64_t>(bytes.element_size());
    // The hash includes each tensor's length, so that moving numbers from one tensor to the next changes it.
    first += (static_cast<uint64_t>(size) << 32) + 1;
    if (!size) continue;
    if (size % 4 || reinterpret_cast<uintptr_t>(data<char>(bytes)) % 4) {  // whole words: a copy that ends in zeros
      Tensor padded = torch::stable::new_zeros(bytes, {(size + 3) / 4 * 4}, ScalarType::Byte);
      succeed(cudaMemcpyAsync(mutable_data<char>(padded), data<char>(bytes), static_cast<size_t>(size),
                              cudaMemcpyDeviceToDevice, stream));
      alive.push_back(std::move(bytes));
      bytes = std::move(padded), size = bytes.numel();
    }
    const char* const error = launch_hash(data<uint32_t>(bytes), size / 4, first, sum, stream);
    GRADKERN_CHECK(!error, "gradkern: the hash kernel could not be launched: ", error ? error : "");
    first += static_cast<uint64_t>(size / 4);
    alive.push_back(std::move(bytes));
  }
  int64_t result = 0;
  succeed(cudaMemcpyAsync(&result, sum, sizeof result, cudaMemcpyDeviceToHost, stream));
  succeed(cudaStreamSynchronize(stream));
  return static_cast<int64_t>(static_cast<uint64_t>(result) + first);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradkern, CUDA, m) { m.impl("content_hash", TORCH_BOX(&hash)); }

}  // namespace gradkern::cuda
