// CUDA launch of a chain: torch's device, stream and allocator around the kernels, which do not know torch.
//
// Nothing here waits for the GPU or allocates behind torch's back, so a launch can be captured into a CUDA graph.

#include <algorithm>

#include "../op_bodies.h"
#include "chain.h"
#include "torch_cuda.h"

namespace gradkern::cuda {

int64_t shared_bytes(int64_t device) {
  int bytes = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(device));
  GRADKERN_CHECK(error == cudaSuccess, "gradkern: cannot ask GPU ", device,
                 " for its shared memory: ", cudaGetErrorString(error));
  return bytes;
}

namespace {

int multiprocessors(int device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  GRADKERN_CHECK(error == cudaSuccess, "gradkern: cannot ask GPU ", device,
                 " for its multiprocessors: ", cudaGetErrorString(error));
  return count;
}

template <class T>
void launch(const ChainCall& call, const CudaSizes& sizes) {
  for (const size_t ports : {call.inputs.size(), call.outputs.size(), call.cotangents.size(), call.results.size()})
    GRADKERN_CHECK(ports <= kPorts, "gradkern: a chain has at most ", kPorts, " inputs and outputs, got ", ports);
  const int device = call.packed.get_device_index();
  Args<T> args{};
  args.forward = data<Record>(call.forward);
  args.backward = call.backward ? data<Record>(*call.backward) : nullptr;
  args.packed = data<T>(call.packed);
  args.tables = data<int32_t>(call.tables);
  for (size_t i = 0; i < call.inputs.size(); ++i) args.inputs[i] = data<T>(call.inputs[i]);
  for (size_t i = 0; i < call.outputs.size(); ++i) args.outputs[i] = mutable_data<T>(call.outputs[i]);
  for (size_t i = 0; i < call.cotangents.size(); ++i) args.cotangents[i] = data<T>(call.cotangents[i]);
  for (size_t i = 0; i < call.results.size(); ++i) args.results[i] = mutable_data<T>(call.results[i]);
  call.describe_seeds<T>(args);
  args.samples = call.samples();
  args.forward_count = static_cast<int>(call.forward.size(0));
  args.backward_count = call.backward ? static_cast<int>(call.backward->size(0)) : 0;
  args.seeds = static_cast<int>(call.seeds());
  args.seed_tile = static_cast<int>(call.seed_tile);
  args.region = static_cast<int>(sizes.region);
  args.sample = static_cast<int>(sizes.sample);
  args.bits = static_cast<int>(sizes.bits);
  args.planned = static_cast<int>(sizes.block);
  const int shared = static_cast<int>(sizes.bytes), processors = multiprocessors(device);
  // Small batches are spread over the whole GPU.
  const int64_t spread = (args.samples + processors - 1) / processors;
  args.block = static_cast<int>(std::max<int64_t>(1, std::min(sizes.block, spread)));
  const int64_t tiles = (args.samples + args.block - 1) / args.block;
  // Allow the maximum, whatever this chain needs, because another thread may be about to launch a larger one.
  const char* error = prepare_chain<T>(static_cast<int>(shared_bytes(device)));
  if (!error)
    error = launch_chain(args, static_cast<int>(std::min<int64_t>(tiles, processors)), kThreads, shared,
                         current_stream(device));
  GRADKERN_CHECK(!error, "gradkern: the chain kernel could not be launched with ", shared,
                 " bytes of shared memory: ", error ? error : "");
}

void run(const ChainCall& call, const CudaSizes& sizes) {
  const DeviceGuard guard(call.packed);
  call.single() ? launch<float>(call, sizes) : launch<double>(call, sizes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradkern, CUDA, m) {
  m.impl("chain_forward", TORCH_BOX((&chain_forward<CudaSizes, run>)));
  m.impl("chain_vjp", TORCH_BOX((&chain_vjp<CudaSizes, run>)));
}

}  // namespace gradkern::cuda
