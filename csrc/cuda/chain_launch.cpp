// CUDA launch of a chain: torch's device, stream and allocator around the kernels, which know nothing of torch.
//
// Nothing here waits for the GPU or allocates behind torch's back, so a launch can be captured into a CUDA graph.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
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
void launch(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables, const at::Tensor& forward,
            const at::Tensor& backward, at::IntArrayRef sizes, const at::Tensor& targets, const at::Tensor& seed_rows,
            at::TensorList cotangents, int64_t seed_tile, at::TensorList outputs, at::TensorList results) {
  for (const size_t ports : {inputs.size(), outputs.size(), cotangents.size(), results.size()})
    TORCH_CHECK(ports <= kPorts, "gradkern: a chain has at most ", kPorts, " inputs and outputs, got ", ports);
  const auto device = inputs[0].device();
  Args<T> args{};
  args.forward = static_cast<const Record*>(forward.const_data_ptr());
  args.backward = static_cast<const Record*>(backward.const_data_ptr());
  args.packed = packed.const_data_ptr<T>();
  args.tables = tables.const_data_ptr<int32_t>();
  for (size_t i = 0; i < inputs.size(); ++i) args.inputs[i] = inputs[i].const_data_ptr<T>();
  for (size_t i = 0; i < outputs.size(); ++i) args.outputs[i] = outputs[i].mutable_data_ptr<T>();
  for (size_t i = 0; i < cotangents.size(); ++i) args.cotangents[i] = cotangents[i].const_data_ptr<T>();
  for (size_t i = 0; i < results.size(); ++i) args.results[i] = results[i].mutable_data_ptr<T>();
  args.samples = inputs[0].size(0);
  args.forward_count = static_cast<int>(forward.size(0));
  args.backward_count = static_cast<int>(backward.size(0));
  const int64_t seeds = !args.backward_count ? 0 : targets.defined() ? targets.size(-1) : cotangents[0].size(1);
  args.seeds = static_cast<int>(seeds);
  args.seed_tile = static_cast<int>(seed_tile);
  if (targets.defined()) {
    args.targets = targets.const_data_ptr<int64_t>();
    args.target_n = targets.dim() == 2 ? seeds : 0;
  }
  if (seed_rows.defined()) {
    args.seed_rows = seed_rows.const_data_ptr<T>();
    args.seed_rows_s = seed_rows.size(-1);
    args.seed_rows_n = seed_rows.dim() == 3 ? seeds * args.seed_rows_s : 0;
  }
  args.region = static_cast<int>(sizes[0]);
  args.sample = static_cast<int>(sizes[1]);
  args.bits = static_cast<int>(sizes[2]);
  args.planned = static_cast<int>(sizes[5]);
  const int shared = static_cast<int>(sizes[4]), processors = multiprocessors(device.index());
  // Small batches are spread over the whole GPU.
  args.block =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(sizes[5], (args.samples + processors - 1) / processors)));
  const int64_t tiles = (args.samples + args.block - 1) / args.block;
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  // All that a block may have, whatever this chain takes: another thread may be about to launch a larger one.
  const char* error = prepare_chain<T>(shared_bytes(device.index()));
  if (!error)
    error =
        launch_chain(args, static_cast<int>(std::min<int64_t>(tiles, processors)), kThreads, shared, stream.stream());
  TORCH_CHECK(!error, "gradkern: the chain kernel could not be launched with ", shared,
              " bytes of shared memory: ", error ? error : "");
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None)
    for (const at::Tensor* t : {&packed, &tables, &forward, &backward}) keep(*t, stream);
}

void run(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables, const at::Tensor& forward,
         const at::Tensor& backward, at::IntArrayRef sizes, const at::Tensor& targets, const at::Tensor& seed_rows,
         at::TensorList cotangents, int64_t seed_tile, at::TensorList outputs, at::TensorList results) {
  for (at::TensorList list : {outputs, cotangents, results})
    for (const at::Tensor& t : list)
      TORCH_CHECK(t.device() == packed.device(), "gradkern: expected all tensors on ", packed.device(), ", got one on ",
                  t.device());
  const bool single = packed.scalar_type() == at::kFloat;
  TORCH_CHECK(single || packed.scalar_type() == at::kDouble, "gradkern: the CUDA kernels take float32 or float64, got ",
              packed.scalar_type());
  if (inputs[0].size(0) == 0) return;
  const c10::cuda::CUDAGuard guard(inputs[0].device());
  const auto go = single ? launch<float> : launch<double>;
  go(inputs, packed, tables, forward, backward, sizes, targets, seed_rows, cotangents, seed_tile, outputs, results);
}

std::vector<at::Tensor> chain_forward(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables,
                                      const at::Tensor& forward, at::IntArrayRef sizes, at::IntArrayRef output_sizes) {
  check_chain(inputs, packed, tables, forward, forward, sizes);
  std::vector<at::Tensor> outputs;
  for (const int64_t size : output_sizes) outputs.push_back(at::empty({inputs[0].size(0), size}, inputs[0].options()));
  run(inputs, packed, tables, forward, forward.slice(0, 0, 0), sizes, {}, {}, {}, 1, outputs, {});
  return outputs;
}

void chain_vjp(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables, const at::Tensor& forward,
               const at::Tensor& backward, at::IntArrayRef sizes, at::TensorList outputs,
               const std::optional<at::Tensor>& targets, const std::optional<at::Tensor>& seed_rows,
               at::TensorList cotangents, int64_t seed_tile, at::TensorList results) {
  const at::Tensor t = targets.value_or(at::Tensor()), rows = seed_rows.value_or(at::Tensor());
  check_chain(inputs, packed, tables, forward, backward, sizes);
  check_seeds(inputs, packed, outputs, t, rows, cotangents, seed_tile, results);
  run(inputs, packed, tables, forward, backward, sizes, t, rows, cotangents, seed_tile, outputs, results);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkern, CUDA, m) {
  m.impl("chain_forward", chain_forward);
  m.impl("chain_vjp", chain_vjp);
}

}  // namespace gradkern::cuda
