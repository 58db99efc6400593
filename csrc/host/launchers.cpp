// The launchers of ../cuda, as they are, around the stand-in GPU of runtime.h: their checks, arguments and block counts
// run on CPU tensors.  Built beside run.cpp, with the folder of this file in front of torch's headers, and called by
// tests/support/host_device.py under the dispatch key that they register themselves for.
#include "../checks.cpp"
#include "../content_hash.cpp"
#include "../cuda/chain_launch.cpp"
#include "../cuda/hash_launch.cpp"
#include "../cuda/rescale_launch.cpp"

namespace {

// The CPU has no streams that a tensor could be told of.
void record_stream(at::Tensor&, at::Stream) { ++gk_gpu()->kept; }

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("record_stream", record_stream); }

extern "C" int gk_shared_bytes(int device) { return gradkern::cuda::shared_bytes(device); }
