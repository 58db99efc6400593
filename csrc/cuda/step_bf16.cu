// The step kernel in bf16.
#include "step_launch.cuh"

namespace gradkern::cuda {
template const char* launch_step<float, kBf16>(const StepArgs<float>&, bool, void*);
}  // namespace gradkern::cuda
