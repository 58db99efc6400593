// The launch of a step without torch: the error text, or null.
#pragma once
#include "step.cuh"

namespace gradkern::cuda {

template <class T, int Math, class S, Source From>
const char* launch_shape(const StepArgs<T>& args, void* stream) {
  constexpr int shared = kStepShared<T, S>;
  const auto kernel = step_kernel<T, Math, S, From>;
  if (const char* error = error_text(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)))
    return error;
  const int64_t down = (args.rows * args.places + S::BM - 1) / S::BM, across = (args.O + S::BN - 1) / S::BN;
  const dim3 grid(static_cast<unsigned>(down * across), 1, static_cast<unsigned>(args.groups * args.phase_count));
  GK_LAUNCH(kernel, grid, kStepThreads, shared, stream, args);
  return error_text(cudaGetLastError());
}

template <class T, int Math>
const char* launch_step(const StepArgs<T>& args, bool narrow, void* stream) {
  return with_shape<Math>(args, narrow,
                          [&]<class S, Source From>() { return launch_shape<T, Math, S, From>(args, stream); });
}

}  // namespace gradkern::cuda
