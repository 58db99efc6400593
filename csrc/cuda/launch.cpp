// The launches: torch's device, stream and allocator around the kernels, which do not know torch.
//
// Nothing here but the hash waits for the GPU or allocates behind torch's back, so a launch can be captured into a CUDA
// graph.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../content_hash.h"
#include "../op_bodies.h"
#include "kernels.h"

namespace gradkern::cuda {

namespace {

int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  TORCH_CHECK(error == cudaSuccess, "gradkern: cannot ask GPU ", device, " for attribute ", static_cast<int>(which),
              ": ", cudaGetErrorString(error));
  return value;
}

}  // namespace

// What the planner has to know of a GPU, in the order of gradkern.codegen.machine.Device: bytes of shared memory that a
// block may have, multiprocessors, kHz, compute capability times ten.  Also loads the kernels, because the first launch
// of one would load it, which a CUDA graph that is being captured does not allow.
std::vector<int64_t> describe_device(int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const char* const error = load_kernels();
  TORCH_CHECK(!error, "gradkern: the kernels cannot be loaded on GPU ", device, ": ", error ? error : "");
  return {
      attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(device, cudaDevAttrMultiProcessorCount),
      attribute(device, cudaDevAttrClockRate),
      attribute(device, cudaDevAttrComputeCapabilityMajor) * 10 + attribute(device, cudaDevAttrComputeCapabilityMinor)};
}

namespace {

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
  const int shared = static_cast<int>(sizes.bytes),
            processors = attribute(device.index(), cudaDevAttrMultiProcessorCount);
  // Small batches are spread over the whole GPU.
  const int64_t spread = (args.samples + processors - 1) / processors;
  args.block = static_cast<int>(std::max<int64_t>(1, std::min(sizes.block, spread)));
  const int64_t tiles = (args.samples + args.block - 1) / args.block;
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  // Allow the maximum, whatever this chain needs, because another thread may be about to launch a larger one.
  const char* error = prepare_chain<T>(attribute(device.index(), cudaDevAttrMaxSharedMemoryPerBlockOptin));
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

constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // numbers of one launch: the kernel counts in 32 bits

// Each launch takes as many samples as 32 bits can count, which is nearly always all of them.
template <class T>
void launch(RescaleArgs<T> args, int64_t samples, bool pooled) {
  const Pool& p = args.pool;
  const int64_t read = args.channels * p.H * p.W, windows = args.channels * p.oh * p.ow;
  const int64_t reach = std::max((p.oh - 1) * p.sh + (p.kh - 1) * p.dh, (p.ow - 1) * p.sw + (p.kw - 1) * p.dw);
  TORCH_CHECK(std::max({read, windows, reach, p.ph, p.pw}) <= kMost, "gradkern: rescale: a sample of ", read,
              " numbers and ", windows, " windows is too large");
  const int64_t most = kMost / std::max(read, windows);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for (int64_t first = 0; first < samples; first += most) {
    const int64_t count = std::min(most, samples - first);
    const char* const error = launch_rescale<T>(args, count * windows, pooled, stream.stream());
    TORCH_CHECK(!error, "gradkern: the rescale kernel could not be launched: ", error ? error : "");
    args.z += count * read;
    args.out += count * windows;
    if (args.ref_rows != 1) args.ref += count * read;
  }
}

at::Tensor rescale(const at::Tensor& z, const at::Tensor& reference, at::IntArrayRef pool, bool relu, double eps) {
  const c10::cuda::CUDAGuard guard(z.device());
  at::Tensor out = rescale_result(z, reference, pool, relu);
  if (out.numel() == 0) return out;
  if (z.scalar_type() == at::kFloat)
    launch(rescale_args<float>(z, reference, pool, relu, eps, out), z.size(0), !pool.empty());
  else launch(rescale_args<double>(z, reference, pool, relu, eps, out), z.size(0), !pool.empty());
  return out;
}

// The one call that waits for the GPU: it copies eight bytes to the host.
int64_t hash(at::TensorList tensors) {
  if (tensors.empty()) return content_hash({});
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  const auto stream = c10::cuda::getCurrentCUDAStream(tensors[0].device().index());
  const at::Tensor total = at::zeros({1}, tensors[0].options().dtype(at::kLong));
  auto* const sum = reinterpret_cast<unsigned long long*>(total.mutable_data_ptr<int64_t>());
  std::vector<at::Tensor> alive;  // until the copy below has waited for the kernels that read them
  uint64_t first = 1;
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(tensor.device() == tensors[0].device(), "gradkern: content_hash: tensors on ", tensors[0].device(),
                " and on ", tensor.device());
    at::Tensor bytes = tensor.detach().contiguous().view({-1}).view(at::kByte);
    const int64_t size = bytes.numel();
    // The hash includes each tensor's length, so that moving numbers from one tensor to the next changes it.
    first += (static_cast<uint64_t>(size) << 32) + 1;
    if (!size) continue;
    if (size % 4 || reinterpret_cast<uintptr_t>(bytes.const_data_ptr()) % 4)  // whole words: a copy that ends in zeros
      bytes = at::constant_pad_nd(bytes, {0, (4 - size % 4) % 4}).clone();
    const char* const error = launch_hash(static_cast<const uint32_t*>(bytes.const_data_ptr()), bytes.numel() / 4,
                                          first, sum, stream.stream());
    TORCH_CHECK(!error, "gradkern: the hash kernel could not be launched: ", error ? error : "");
    first += static_cast<uint64_t>(bytes.numel() / 4);
    alive.push_back(std::move(bytes));
  }
  return total.item<int64_t>() + static_cast<int64_t>(first);
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkern, CUDA, m) {
  m.impl("chain_forward", chain_forward<CudaSizes, run>);
  m.impl("chain_vjp", chain_vjp<CudaSizes, run>);
  m.impl("rescale", rescale);
  m.impl("content_hash", hash);
}

}  // namespace gradkern::cuda
