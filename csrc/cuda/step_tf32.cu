// The step kernel in TF32.
#include "step_launch.cuh"

namespace gradkern::cuda {
template const char* launch_step<float, kTf32>(const StepArgs<float>&, bool, void*);
}  // namespace gradkern::cuda
