// CUDA launch of a chain: torch's device, stream and allocator around the kernels, which do not know torch.
//
// Nothing here waits for the GPU or allocates behind torch's back, so a launch can be captured into a CUDA graph.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "../op_bodies.h"
#include "chain.h"

namespace gradkern::cuda {

int shared_bytes(int device) {
  int bytes = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  TORCH_CHECK(error == cudaSuccess, "gradkern: cannot ask GPU ", device,
              " for its shared memory: ", cudaGetErrorString(error));
  return bytes;
}

namespace {

int multiprocessors(int device) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  TORCH_CHECK(error == cudaSuccess, "gradkern: cannot ask GPU ", device,
              " for its multiprocessors: ", cudaGetErrorString(error));
  return count;
}

// Tensors that live in gradkern's cache may be freed by another thread while this stream still reads them.
void keep(const at::Tensor& tensor, c10::cuda::CUDAStream stream) {
  if (tensor.numel()) tensor.record_stream(stream);
}

template <class T>
void launch(const ChainCall& call, const CudaSizes& sizes) {
  for (const size_t ports : {call.inputs.size(), call.outputs.size(), call.cotangents.size(), call.results.size()})
    TORCH_CHECK(ports <= kPorts, "gradkern: a chain has at most ", kPorts, " inputs and outputs, got ", ports);
  const auto device = call.packed.device();
  Args<T> args{};
  args.forward = static_cast<const Record*>(call.forward.const_data_ptr());
  args.backward = static_cast<const Record*>(call.backward.const_data_ptr());
  args.packed = call.packed.const_data_ptr<T>();
  args.tables = call.tables.const_data_ptr<int32_t>();
  for (size_t i = 0; i < call.inputs.size(); ++i) args.inputs[i] = call.inputs[i].const_data_ptr<T>();
  for (size_t i = 0; i < call.outputs.size(); ++i) args.outputs[i] = call.outputs[i].mutable_data_ptr<T>();
  for (size_t i = 0; i < call.cotangents.size(); ++i) args.cotangents[i] = call.cotangents[i].const_data_ptr<T>();
  for (size_t i = 0; i < call.results.size(); ++i) args.results[i] = call.results[i].mutable_data_ptr<T>();
  call.describe_seeds<T>(args);
  args.samples = call.samples();
  args.forward_count = static_cast<int>(call.forward.size(0));
  args.backward_count = static_cast<int>(call.backward.size(0));
  args.seeds = static_cast<int>(call.seeds());
  args.seed_tile = static_cast<int>(call.seed_tile);
  args.region = static_cast<int>(sizes.region);
  args.sample = static_cast<int>(sizes.sample);
  args.bits = static_cast<int>(sizes.bits);
  args.planned = static_cast<int>(sizes.block);
  const int shared = static_cast<int>(sizes.bytes), processors = multiprocessors(device.index());
  // Small batches are spread over the whole GPU.
  const int64_t spread = (args.samples + processors - 1) / processors;
  args.block = static_cast<int>(std::max<int64_t>(1, std::min(sizes.block, spread)));
  const int64_t tiles = (args.samples + args.block - 1) / args.block;
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  // Allow the maximum, whatever this chain needs, because another thread may be about to launch a larger one.
  const char* error = prepare_chain<T>(shared_bytes(device.index()));
  if (!error)
    error =
        launch_chain(args, static_cast<int>(std::min<int64_t>(tiles, processors)), kThreads, shared, stream.stream());
  TORCH_CHECK(!error, "gradkern: the chain kernel could not be launched with ", shared,
              " bytes of shared memory: ", error ? error : "");
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None)
    for (const at::Tensor* t : {&call.packed, &call.tables, &call.forward, &call.backward}) keep(*t, stream);
}

void run(const ChainCall& call, const CudaSizes& sizes) {
  const c10::cuda::CUDAGuard guard(call.packed.device());
  call.single() ? launch<float>(call, sizes) : launch<double>(call, sizes);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkern, CUDA, m) {
  m.impl("chain_forward", chain_forward<CudaSizes, run>);
  m.impl("chain_vjp", chain_vjp<CudaSizes, run>);
}

}  // namespace gradkern::cuda
