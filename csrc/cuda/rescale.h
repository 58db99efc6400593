// DeepLift's multipliers on the GPU: the interface between the launcher, which knows torch, and the kernel.
#pragma once
#include <cstdint>

#include "../rescale_rule.h"

namespace gradkern::cuda {

// `windows`: results per place of a window, below 2^31.  `pooled`: a max pool's multipliers, else a ReLU's secants. The
// error text, or null.
template <class T>
const char* launch_rescale(const RescaleArgs<T>& args, int64_t windows, bool pooled, void* stream);

}  // namespace gradkern::cuda
