// The parts of torch's header of this name that the launchers use, for the stand-in GPU.
#pragma once
#include "CUDAStream.h"

namespace c10::cuda {

class CUDAGuard {
 public:
  explicit CUDAGuard(Device) { ++gk_gpu()->guards; }
  ~CUDAGuard() { --gk_gpu()->guards; }
  CUDAGuard(const CUDAGuard&) = delete;
};

}  // namespace c10::cuda
