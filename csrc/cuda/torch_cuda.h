// The device and stream that torch works on, by its stable ABI.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "../torch_abi.h"

// torch's headers declare these only where USE_CUDA is defined.
extern "C" {
struct CUDAGuardOpaque;
AOTITorchError aoti_torch_create_cuda_guard(int32_t device, CUDAGuardOpaque** guard);
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardOpaque* guard);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
}

namespace gradkern::cuda {

// A device, or that of a tensor, is the current one while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    const AOTITorchError error = aoti_torch_create_cuda_guard(device, &guard_);
    GRADKERN_CHECK(error == 0, "gradkern: cannot make GPU ", device, " the current device");
  }
  explicit DeviceGuard(const Tensor& tensor) : DeviceGuard(tensor.get_device_index()) {}
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(guard_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUDAGuardOpaque* guard_ = nullptr;
};

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device, &stream);
  GRADKERN_CHECK(error == 0, "gradkern: cannot ask torch for the current stream of GPU ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace gradkern::cuda
