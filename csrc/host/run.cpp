// Launches of the kernels on the host, for the tests: a plain C interface, no torch, no CUDA.
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "../cuda/chain.cuh"

namespace {

using namespace gradkern;

// Blocks one after the other; the threads of a block at once.  Every block's arena starts as NaNs, so that a number
// that nobody wrote shows.
template <class T, int Products>
void launch(const cuda::Args<T>& args, unsigned blocks, unsigned threads, size_t bytes) {
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
      host::grid_size.x = blocks;
      for (unsigned b = 0; b < blocks; ++b) {
        if (i == 0) std::memset(arena, 0xff, bytes);
        __syncthreads();
        host::block_index.x = b;
        cuda::chain_kernel<T, Products>(args);
        __syncthreads();
      }
    });
  for (std::thread& t : running) t.join();
}

}  // namespace

extern "C" {
int gk_args_size() { return sizeof(cuda::Args<float>); }
// `products`: 0 in fp32, else so many TF32 products; double takes 0 alone.
void gk_run_f32(const cuda::Args<float>* args, int products, int blocks, int threads, int64_t bytes) {
  if (products == 3) return launch<float, 3>(*args, blocks, threads, bytes);
  if (products == 1) return launch<float, 1>(*args, blocks, threads, bytes);
  launch<float, 0>(*args, blocks, threads, bytes);
}
void gk_run_f64(const cuda::Args<double>* args, int, int blocks, int threads, int64_t bytes) {
  launch<double, 0>(*args, blocks, threads, bytes);
}
}
