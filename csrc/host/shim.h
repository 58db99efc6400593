// CUDA's keywords for a host compiler, with one host thread per CUDA thread of a block, and barriers for __syncthreads
// and for warps.  Kernels of ../cuda run unchanged, so the oracle and the sanitizers check the same code.
#pragma once
#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define GK_DEVICE inline
#define GK_RECORD inline
#define GK_KERNEL(threads, blocks) void
#define GK_SHARED_MEMORY(name) unsigned char* name = ::gradkern::host::self.block->memory
#define __grid_constant__

// As aligned as CUDA's own: a GPU faults at a 16-byte access elsewhere, and so does the sanitizer here.
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace gradkern::host {

struct Dim {
  unsigned x, y = 1, z = 1;
};

class Barrier {
 public:
  explicit Barrier(unsigned count) { pthread_barrier_init(&barrier_, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  uint32_t word[32];
  double number[32];
};

struct Block {
  unsigned char* memory;
  size_t bytes;
  Barrier barrier;
  Warp* warps;
};

// The indices and the block of a CUDA thread.
struct Self {
  Block* block;
  Warp* warp;
  unsigned lane;
};

inline thread_local Self self;
inline thread_local Dim thread_index, block_index, block_size, grid_size;

}  // namespace gradkern::host

#define threadIdx (::gradkern::host::thread_index)
#define blockIdx (::gradkern::host::block_index)
#define blockDim (::gradkern::host::block_size)
#define gridDim (::gradkern::host::grid_size)

inline void __syncthreads() { gradkern::host::self.block->barrier.wait(); }
inline void __syncwarp(uint32_t = 0xffffffffu) { gradkern::host::self.warp->barrier.wait(); }

// Every lane of the warp must call this; the kernels ensure it.
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  auto& me = gradkern::host::self;
  me.warp->word[me.lane] = vote;
  me.warp->barrier.wait();
  uint32_t votes = 0;
  for (int l = 0; l < 32; ++l) votes |= me.warp->word[l] << l;
  me.warp->barrier.wait();
  return votes;
}

// As above, every lane of the warp must call this.
template <class T>
inline T __shfl_xor_sync(uint32_t, T x, int lanes) {
  auto& me = gradkern::host::self;
  double* const kept = me.warp->number;
  kept[me.lane] = x;
  me.warp->barrier.wait();
  const T other = static_cast<T>(kept[me.lane ^ static_cast<unsigned>(lanes)]);
  me.warp->barrier.wait();
  return other;
}

inline void atomicAdd(unsigned long long* p, unsigned long long x) { __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
