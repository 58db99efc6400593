// The launches: torch's device, stream and allocator around the kernels, which do not know torch.
//
// Nothing here but the hash waits for the GPU or allocates behind torch's back, so a launch can be captured into a CUDA
// graph.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

#include "../content_hash.h"
#include "../op_bodies.h"
#include "../torch_abi.h"
#include "kernels.h"

// torch's headers declare these only where USE_CUDA is defined.
extern "C" {
struct CUDAGuardOpaque;
AOTITorchError aoti_torch_create_cuda_guard(int32_t device, CUDAGuardOpaque** guard);
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardOpaque* guard);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
}

namespace gradkern::cuda {

namespace {

// A device, or that of a tensor, is the current one while this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    const AOTITorchError error = aoti_torch_create_cuda_guard(device, &guard_);
    GRADKERN_CHECK(error == 0, "gradkern: cannot make GPU ", device, " the current device");
  }
  explicit DeviceGuard(const Tensor& tensor) : DeviceGuard(tensor.get_device_index()) {}
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(guard_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUDAGuardOpaque* guard_ = nullptr;
};

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device, &stream);
  GRADKERN_CHECK(error == 0, "gradkern: cannot ask torch for the current stream of GPU ", device);
  return static_cast<cudaStream_t>(stream);
}

int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  GRADKERN_CHECK(error == cudaSuccess, "gradkern: cannot ask GPU ", device, " for attribute ", static_cast<int>(which),
                 ": ", cudaGetErrorString(error));
  return value;
}

}  // namespace

// What the planner has to know of a GPU, in the order of gradkern.codegen.machine.Device: bytes of shared memory that a
// block may have, multiprocessors, kHz, compute capability times ten.  Also loads the kernels, because the first launch
// of one would load it, which a CUDA graph that is being captured does not allow.
std::vector<int64_t> describe_device(int64_t number) {
  const int device = static_cast<int>(number);
  const DeviceGuard guard(device);
  const char* const error = load_kernels();
  GRADKERN_CHECK(!error, "gradkern: the kernels cannot be loaded on GPU ", device, ": ", error ? error : "");
  const int capability =
      attribute(device, cudaDevAttrComputeCapabilityMajor) * 10 + attribute(device, cudaDevAttrComputeCapabilityMinor);
  return {attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(device, cudaDevAttrMultiProcessorCount),
          attribute(device, cudaDevAttrClockRate), capability};
}

namespace {

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
  args.workspace = static_cast<int>(sizes.workspace);
  args.sample = static_cast<int>(sizes.sample);
  args.bits = static_cast<int>(sizes.bits);
  args.planned = static_cast<int>(sizes.block);
  const int shared = static_cast<int>(sizes.bytes), processors = attribute(device, cudaDevAttrMultiProcessorCount);
  // Small batches are spread over the whole GPU.
  const int64_t spread = (args.samples + processors - 1) / processors;
  args.block = static_cast<int>(std::max<int64_t>(1, std::min(sizes.block, spread)));
  const int64_t tiles = (args.samples + args.block - 1) / args.block;
  // Allow the maximum, whatever this chain needs, because another thread may be about to launch a larger one.
  const int most = attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const char* const error = launch_chain(args, static_cast<int>(std::min<int64_t>(tiles, processors)), kThreads, shared,
                                         most, current_stream(device));
  GRADKERN_CHECK(!error, "gradkern: the chain kernel could not be launched with ", shared,
                 " bytes of shared memory: ", error ? error : "");
}

void run(const ChainCall& call, const CudaSizes& sizes) {
  const DeviceGuard guard(call.packed);
  call.single() ? launch<float>(call, sizes) : launch<double>(call, sizes);
}

constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // numbers of one launch: the kernel counts in 32 bits

// Each launch takes as many samples as 32 bits can count, which is nearly always all of them.
template <class T>
void launch(RescaleArgs<T> args, int64_t samples, bool pooled, cudaStream_t stream) {
  const Pool& p = args.pool;
  const int64_t read = args.channels * p.H * p.W, windows = args.channels * p.oh * p.ow;
  const int64_t reach = std::max((p.oh - 1) * p.sh + (p.kh - 1) * p.dh, (p.ow - 1) * p.sw + (p.kw - 1) * p.dw);
  GRADKERN_CHECK(std::max({read, windows, reach, p.ph, p.pw}) <= kMost, "gradkern: rescale: a sample of ", read,
                 " numbers and ", windows, " windows is too large");
  const int64_t most = kMost / std::max(read, windows);
  for (int64_t first = 0; first < samples; first += most) {
    const int64_t count = std::min(most, samples - first);
    const char* const error = launch_rescale<T>(args, count * windows, pooled, stream);
    GRADKERN_CHECK(!error, "gradkern: the rescale kernel could not be launched: ", error ? error : "");
    args.z += count * read;
    args.out += count * windows;
    if (args.ref_rows != 1) args.ref += count * read;
  }
}

Tensor rescale(const Tensor& z, const Tensor& reference, const Ints& pool, bool relu, double eps) {
  const DeviceGuard guard(z);
  const cudaStream_t stream = current_stream(z.get_device_index());
  Tensor out = rescale_result(z, reference, pool, relu);
  if (out.numel() == 0) return out;
  if (z.scalar_type() == ScalarType::Float)
    launch(rescale_args<float>(z, reference, pool, relu, eps, out), z.size(0), !pool.empty(), stream);
  else launch(rescale_args<double>(z, reference, pool, relu, eps, out), z.size(0), !pool.empty(), stream);
  return out;
}

void succeed(cudaError_t error) {
  GRADKERN_CHECK(error == cudaSuccess, "gradkern: content_hash: ", cudaGetErrorString(error));
}

// The one call that waits for the GPU: it copies eight bytes to the host.
int64_t hash(const Tensors& tensors) {
  if (tensors.empty()) return content_hash({});
  const DeviceGuard guard(tensors[0]);
  const cudaStream_t stream = current_stream(tensors[0].get_device_index());
  const Tensor total = torch::stable::new_zeros(tensors[0], {1}, ScalarType::Long);
  auto* const sum = mutable_data<unsigned long long>(total);
  Tensors alive;  // until the copy below has waited for the kernels that read them
  uint64_t first = 1;
  for (const Tensor& tensor : tensors) {
    GRADKERN_CHECK(tensor.device() == tensors[0].device(), "gradkern: content_hash: tensors on ", tensors[0].device(),
                   " and on ", tensor.device());
    Tensor bytes = torch::stable::contiguous(tensor);
    int64_t size = bytes.numel() * static_cast<int64_t>(bytes.element_size());
    // The hash includes each tensor's length, so that moving numbers from one tensor to the next changes it.
    first += (static_cast<uint64_t>(size) << 32) + 1;
    if (!size) continue;
    if (size % 4 || reinterpret_cast<uintptr_t>(data<char>(bytes)) % 4) {  // whole words: a copy that ends in zeros
      Tensor padded = torch::stable::new_zeros(bytes, {(size + 3) / 4 * 4}, ScalarType::Byte);
      succeed(cudaMemcpyAsync(mutable_data<char>(padded), data<char>(bytes), static_cast<size_t>(size),
                              cudaMemcpyDeviceToDevice, stream));
      alive.push_back(std::move(bytes));
      bytes = std::move(padded), size = bytes.numel();
    }
    const char* const error = launch_hash(data<uint32_t>(bytes), size / 4, first, sum, stream);
    GRADKERN_CHECK(!error, "gradkern: the hash kernel could not be launched: ", error ? error : "");
    first += static_cast<uint64_t>(size / 4);
    alive.push_back(std::move(bytes));
  }
  int64_t result = 0;
  succeed(cudaMemcpyAsync(&result, sum, sizeof result, cudaMemcpyDeviceToHost, stream));
  succeed(cudaStreamSynchronize(stream));
  return static_cast<int64_t>(static_cast<uint64_t>(result) + first);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradkern, CUDA, m) {
  m.impl("chain_forward", TORCH_BOX((&chain_forward<CudaSizes, run>)));
  m.impl("chain_vjp", TORCH_BOX((&chain_vjp<CudaSizes, run>)));
  m.impl("rescale", TORCH_BOX(&rescale));
  m.impl("content_hash", TORCH_BOX(&hash));
}

}  // namespace gradkern::cuda
