// The launches of ../cuda on the host, for the tests, with a plain C interface and the launchers' own functions.  It
// needs neither torch nor CUDA.
#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "../cuda/kernels.cu"

using namespace gradkern;

namespace {

constexpr int kAlways = 48 << 10;  // bytes of shared memory that a kernel may have without asking

host::Gpu gpu{132, 232448, 0, 0, 0, 0, 0, 0};
thread_local cudaError_t last_error = cudaSuccess;
std::mutex limits_lock;
std::map<const void*, int> limits;  // shared memory that a kernel was allowed
std::set<const void*> loaded;

}  // namespace

host::Gpu* gk_gpu() { return &gpu; }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = gpu.processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = gpu.shared_bytes; break;
    case cudaDevAttrClockRate: *value = 1755000; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
  }
  return cudaSuccess;
}

namespace gradkern::host {

cudaError_t load(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits_lock);
  if (loaded.contains(kernel)) return cudaSuccess;
  if (gpu.capturing) return last_error = cudaErrorStreamCaptureUnsupported;
  loaded.insert(kernel);
  gpu.loaded = static_cast<int>(loaded.size());
  return cudaSuccess;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > gpu.shared_bytes) return last_error = cudaErrorInvalidValue;
  if (const cudaError_t error = load(kernel)) return error;
  const std::lock_guard<std::mutex> lock(limits_lock);
  limits[kernel] = gpu.allowed = bytes;
  return cudaSuccess;
}

bool may_launch(const void* kernel, Dim grid, unsigned threads, size_t shared) {
  constexpr unsigned kAlongX = 0x7fffffff, kAlong = 65535;
  gpu.launches += 1, gpu.blocks = static_cast<int>(grid.x);
  if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024 || grid.x > kAlongX || grid.y > kAlong ||
      grid.z > kAlong) {
    last_error = cudaErrorInvalidConfiguration;
    return false;
  }
  if (load(kernel)) return false;
  const std::lock_guard<std::mutex> lock(limits_lock);
  const auto allowed = limits.find(kernel);
  if (shared > static_cast<size_t>(allowed == limits.end() ? kAlways : std::max(allowed->second, kAlways)))
    last_error = cudaErrorInvalidValue;
  return last_error == cudaSuccess;
}

}  // namespace gradkern::host

namespace {

template <class T>
const char* chain(const cuda::Args<T>& args, int blocks, int threads, int64_t bytes) {
  return cuda::launch_chain(args, blocks, threads, static_cast<size_t>(bytes), static_cast<int>(bytes), nullptr);
}

// `windows`: results per place of a window.
template <class T>
void rescale(const RescaleArgs<T>& args, int64_t windows, bool pooled, int blocks, int threads) {
  const auto count = static_cast<uint32_t>(windows);
  host::launch({static_cast<unsigned>(blocks)}, static_cast<unsigned>(threads), 16, [&] {
    !pooled     ? cuda::secant_kernel<T>(args, count)
    : args.relu ? cuda::rescale_kernel<T, true>(args, count)
                : cuda::rescale_kernel<T, false>(args, count);
  });
}

}  // namespace

extern "C" {
int gk_args_size() { return sizeof(cuda::Args<float>); }
int gk_rescale_args_size() { return sizeof(RescaleArgs<double>); }
int gk_gpu_size() { return sizeof(host::Gpu); }
// Resets the state to that of a new process.
void gk_unload() { loaded.clear(), gpu.loaded = 0; }
// The error text, or null.
const char* gk_run_f32(const cuda::Args<float>* args, int blocks, int threads, int64_t bytes) {
  return chain(*args, blocks, threads, bytes);
}
const char* gk_run_f64(const cuda::Args<double>* args, int blocks, int threads, int64_t bytes) {
  return chain(*args, blocks, threads, bytes);
}
// Division by a constant divisor by multiplication, for tests at the ends of the range.
void gk_divide(const int* numbers, int count, int divisor, int* quotients, int* rests) {
  const cuda::Divider by(divisor);
  for (int i = 0; i < count; ++i) {
    const auto [quotient, rest] = by.parts(numbers[i]);
    quotients[i] = quotient, rests[i] = rest;
  }
}
void gk_hash(const uint32_t* words, int64_t count, uint64_t first, unsigned long long* total, int blocks) {
  host::launch({static_cast<unsigned>(blocks)}, cuda::kHashThreads, 16,
               [&] { cuda::hash_kernel(words, count, first, total); });
}
void gk_rescale_f32(const RescaleArgs<float>* args, int64_t windows, int pooled, int blocks, int threads) {
  rescale(*args, windows, pooled, blocks, threads);
}
void gk_rescale_f64(const RescaleArgs<double>* args, int64_t windows, int pooled, int blocks, int threads) {
  rescale(*args, windows, pooled, blocks, threads);
}
}
