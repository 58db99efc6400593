// The parts of torch's header of this name that the launchers use, for the stand-in GPU.
#pragma once
#include <c10/core/Stream.h>

#include "../../runtime.h"

namespace c10::cuda {

class CUDAStream {
 public:
  operator Stream() const { return Stream(Stream::DEFAULT, Device(DeviceType::CPU)); }
  cudaStream_t stream() const { return nullptr; }
};

inline CUDAStream getCurrentCUDAStream(DeviceIndex = -1) { return {}; }

}  // namespace c10::cuda
