// The step kernel in single precision.
#include "step_launch.cuh"

namespace gradkern::cuda {
template const char* launch_step<float, kPlain>(const StepArgs<float>&, bool, void*);
}  // namespace gradkern::cuda
