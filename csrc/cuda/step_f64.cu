// The step kernel in double precision.
#include "step_launch.cuh"

namespace gradkern::cuda {
template const char* launch_step<double, kPlain>(const StepArgs<double>&, bool, void*);
}  // namespace gradkern::cuda
