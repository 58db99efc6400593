// Launches of the kernels on the host, for the tests: a plain C interface, no torch, no CUDA.
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "../cuda/chain.cuh"
#include "../cuda/hash.cuh"
#include "../cuda/shares.cuh"
#include "../cuda/step.cuh"

namespace {

using namespace gradkern;

// Blocks one after the other; the threads of a block at once.  Every block's arena starts as NaNs, so that a number
// that nobody wrote shows.
template <class Kernel>
void launch(host::Dim grid, unsigned threads, size_t bytes, const Kernel& kernel) {
  // Exactly as large as asked for, so that the address sanitizer sees one byte past it.
  const std::unique_ptr<unsigned char, void (*)(void*)> memory(
      static_cast<unsigned char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16)), std::free);
  unsigned char* const arena = memory.get();
  std::vector<host::Warp> warps(threads / 32);
  host::Block block{arena, host::Barrier(threads), warps.data()};
  std::vector<std::thread> running;
  for (unsigned i = 0; i < threads; ++i)
    running.emplace_back([&, i] {
      host::self = {&block, &warps[i / 32], i % 32};
      host::thread_index.x = i;
      host::block_size.x = threads;
      host::grid_size = grid;
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned b = 0; b < grid.x; ++b) {
          if (i == 0) std::memset(arena, 0xff, bytes);
          __syncthreads();
          host::block_index = {b, 0, z};
          kernel();
          __syncthreads();
        }
    });
  for (std::thread& t : running) t.join();
}

template <class T, int Math>
void chain(const cuda::Args<T>& args, int blocks, int threads, int64_t bytes) {
  launch({static_cast<unsigned>(blocks)}, static_cast<unsigned>(threads), static_cast<size_t>(bytes),
         [&] { cuda::chain_kernel<T, Math>(args); });
}

template <class T, int Math, class S, cuda::Source From>
void shape(const cuda::StepArgs<T>& args) {
  const int64_t blocks = (args.rows * args.places + S::BM - 1) / S::BM * ((args.O + S::BN - 1) / S::BN);
  launch({static_cast<unsigned>(blocks), 1, static_cast<unsigned>(args.groups * args.phase_count)}, cuda::kStepThreads,
         cuda::kStepShared<T, S>, [&] { cuda::step_kernel<T, Math, S, From>(args); });
}
template <class T, int Math>
void step(const cuda::StepArgs<T>& args, bool narrow) {
  cuda::with_shape<Math>(args, narrow, [&]<class S, cuda::Source From>() { shape<T, Math, S, From>(args); });
}

// `windows`: results per place of a window.
template <class T>
void rescale(const SharesArgs<T>& args, int64_t windows, bool pooled, int blocks, int threads) {
  const auto count = static_cast<uint32_t>(windows);
  launch({static_cast<unsigned>(blocks)}, static_cast<unsigned>(threads), 16, [&] {
    !pooled     ? cuda::secant_kernel<T>(args, count)
    : args.relu ? cuda::shares_kernel<T, true>(args, count)
                : cuda::shares_kernel<T, false>(args, count);
  });
}

}  // namespace

extern "C" {
int gk_args_size() { return sizeof(cuda::Args<float>); }
int gk_step_args_size() { return sizeof(cuda::StepArgs<float>); }
int gk_shares_args_size() { return sizeof(SharesArgs<double>); }
// `math`: how to multiply, as in args.h; double takes kPlain alone.
void gk_run_f32(const cuda::Args<float>* args, int math, int blocks, int threads, int64_t bytes) {
  switch (math) {
    case cuda::kTf32x3: return chain<float, cuda::kTf32x3>(*args, blocks, threads, bytes);
    case cuda::kTf32: return chain<float, cuda::kTf32>(*args, blocks, threads, bytes);
    case cuda::kBf16: return chain<float, cuda::kBf16>(*args, blocks, threads, bytes);
    default: return chain<float, cuda::kPlain>(*args, blocks, threads, bytes);
  }
}
void gk_run_f64(const cuda::Args<double>* args, int, int blocks, int threads, int64_t bytes) {
  chain<double, cuda::kPlain>(*args, blocks, threads, bytes);
}
void gk_hash(const uint32_t* words, int64_t count, uint64_t first, unsigned long long* total, int blocks) {
  launch({static_cast<unsigned>(blocks)}, cuda::kHashThreads, 16,
         [&] { cuda::hash_kernel(words, count, first, total); });
}
void gk_step_f32(const cuda::StepArgs<float>* args, int math, int narrow) {
  switch (math) {
    case cuda::kTf32x3: return step<float, cuda::kTf32x3>(*args, narrow);
    case cuda::kTf32: return step<float, cuda::kTf32>(*args, narrow);
    case cuda::kBf16: return step<float, cuda::kBf16>(*args, narrow);
    default: return step<float, cuda::kPlain>(*args, narrow);
  }
}
void gk_step_f64(const cuda::StepArgs<double>* args, int, int narrow) { step<double, cuda::kPlain>(*args, narrow); }
void gk_rescale_f32(const SharesArgs<float>* args, int64_t windows, int pooled, int blocks, int threads) {
  rescale(*args, windows, pooled, blocks, threads);
}
void gk_rescale_f64(const SharesArgs<double>* args, int64_t windows, int pooled, int blocks, int threads) {
  rescale(*args, windows, pooled, blocks, threads);
}
}
