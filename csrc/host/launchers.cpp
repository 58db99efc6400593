// The launchers of ../cuda, unchanged, with the stand-in GPU of runtime.h: their checks, arguments and block counts run
// on CPU tensors.  They are built with run.cpp, with the folder of this file before torch's headers.  They register for
// torch's CUDA dispatch key, under which tests/support/host_device.py calls them.
#include "../checks.cpp"
#include "../content_hash.cpp"
#include "../cuda/launch.cpp"

namespace {

// The CPU has no streams, so there is nothing to record.
void record_stream(at::Tensor&, at::Stream) { ++gk_gpu()->kept; }

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("record_stream", record_stream); }

// The four facts about a device.
extern "C" void gk_describe_device(int device, int64_t* facts) {
  const auto found = gradkern::cuda::describe_device(device);
  std::copy(found.begin(), found.end(), facts);
}
