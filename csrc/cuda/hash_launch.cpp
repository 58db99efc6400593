// CUDA launch of the content hash.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "../content_hash.h"
#include "hash.h"

namespace gradkern::cuda {

namespace {

// The one call that waits for the GPU: it copies eight bytes to the host.
int64_t hash(at::TensorList tensors) {
  if (tensors.empty()) return content_hash({});
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream(tensors[0].device().index());
  const at::Tensor total = at::zeros({1}, tensors[0].options().dtype(at::kLong));
  auto* const sum = reinterpret_cast<unsigned long long*>(total.mutable_data_ptr<int64_t>());
  std::vector<at::Tensor> alive;  // until the copy below has waited for the kernels that read them
  uint64_t first = 1;
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device() == tensors[0].device(), "gradkern: content_hash: tensors on ", tensors[0].device(),
                " and on ", tensor.device());
    at::Tensor bytes = tensor.detach().contiguous().view({-1}).view(at::kByte);
    const int64_t size = bytes.numel();
    // The hash includes each tensor's length, so that moving numbers from one tensor to the next changes it.
    first += (static_cast<uint64_t>(size) << 32) + 1;
    if (!size) continue;
    if (size % 4 || reinterpret_cast<uintptr_t>(bytes.const_data_ptr()) % 4)  // whole words: a copy that ends in zeros
      bytes = at::constant_pad_nd(bytes, {0, (4 - size % 4) % 4}).clone();
    const char* const error = launch_hash(static_cast<const uint32_t*>(bytes.const_data_ptr()), bytes.numel() / 4,
                                          first, sum, stream.stream());
    TORCH_CHECK(!error, "gradkern: the hash kernel could not be launched: ", error ? error : "");
    first += static_cast<uint64_t>(bytes.numel() / 4);
    alive.push_back(std::move(bytes));
  }
  return total.item<int64_t>() + static_cast<int64_t>(first);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkern, CUDA, m) { m.impl("content_hash", hash); }

}  // namespace gradkern::cuda
