// The parts of torch's header of this name that the launchers use, for the stand-in GPU.
#pragma once
#include "CUDAStream.h"

namespace c10::cuda {

enum class CaptureStatus : int { None, Active, Invalidated };

inline CaptureStatus currentStreamCaptureStatusMayInitCtx() {
  return gk_gpu()->capturing ? CaptureStatus::Active : CaptureStatus::None;
}

}  // namespace c10::cuda
