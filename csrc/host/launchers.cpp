// The launchers of ../cuda, unchanged, with the stand-in GPU of runtime.h: their checks, arguments and block counts run
// on CPU tensors.  They are built with run.cpp, with the folder of this file before torch's headers.  They register for
// torch's CUDA dispatch key, under which tests/support/host_device.py calls them.
#include "../checks.cpp"
#include "../cuda/launch.cpp"

// Only for an empty list of tensors, which is all that the launchers need.
int64_t gradkern::content_hash(const Tensors&) { return 0; }

extern "C" {
// A CPU build of torch does not have these functions.
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardOpaque**) { return ++gk_gpu()->guards, 0; }
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardOpaque*) { return --gk_gpu()->guards, 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }

// The four facts about a device.
void gk_describe_device(int device, int64_t* facts) {
  const auto found = gradkern::cuda::describe_device(device);
  std::copy(found.begin(), found.end(), facts);
}
}
