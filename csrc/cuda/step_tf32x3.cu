// The step kernel in three TF32 products.
#include "step_launch.cuh"

namespace gradkern::cuda {
template const char* launch_step<float, kTf32x3>(const StepArgs<float>&, bool, void*);
}  // namespace gradkern::cuda
