// CUDA's words for a host compiler: one host thread per CUDA thread of a block, barriers for __syncthreads and for
// warps.  Kernels of ../cuda run unchanged, so the oracle and the sanitizers see the very code.
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
#define GK_SHARED_ARENA(name) unsigned char* name = ::gradkern::host::self.block->arena
#define __grid_constant__
// What the device compiler is told to assume, looked at.
#define GK_SHARED(pointer) ::gradkern::host::must_be_shared(pointer)

struct float4 {
  float x, y, z, w;
};
struct double2 {
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
  uint32_t a[4][32], b[2][32];  // fragments of an mma
};

struct Block {
  unsigned char* arena;
  size_t bytes;
  Barrier barrier;
  Warp* warps;
};

// What a CUDA thread knows of itself.
struct Self {
  Block* block;
  Warp* warp;
  unsigned lane;
};

inline thread_local Self self;
inline thread_local Dim thread_index, block_index, block_size, grid_size;

inline void must_be_shared(const void* pointer) {
  const auto* const byte = static_cast<const unsigned char*>(pointer);
  if (byte >= self.block->arena && byte < self.block->arena + self.block->bytes) return;
  std::fputs("a kernel calls a pointer shared that lies outside its block's arena\n", stderr);
  std::abort();
}

}  // namespace gradkern::host

#define threadIdx (::gradkern::host::thread_index)
#define blockIdx (::gradkern::host::block_index)
#define blockDim (::gradkern::host::block_size)
#define gridDim (::gradkern::host::grid_size)

inline void __syncthreads() { gradkern::host::self.block->barrier.wait(); }
inline void __syncwarp(uint32_t = 0xffffffffu) { gradkern::host::self.warp->barrier.wait(); }

// Every lane of the warp must come here, as the kernels always see to.
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  auto& me = gradkern::host::self;
  me.warp->word[me.lane] = vote;
  me.warp->barrier.wait();
  uint32_t found = 0;
  for (int l = 0; l < 32; ++l) found |= me.warp->word[l] << l;
  me.warp->barrier.wait();
  return found;
}

// As above: every lane of the warp.
template <class T>
inline T __shfl_xor_sync(uint32_t, T x, int lanes) {
  auto& me = gradkern::host::self;
  double* const kept = me.warp->number;
  kept[me.lane] = x;
  me.warp->barrier.wait();
  const T found = static_cast<T>(kept[me.lane ^ static_cast<unsigned>(lanes)]);
  me.warp->barrier.wait();
  return found;
}

namespace gradkern::cuda {

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// Ten bits of mantissa, ties away from zero.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

// Eight bits of mantissa, ties to even.
inline uint32_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline uint32_t to_bf16x2(float low, float high) { return to_bf16(high) << 16 | to_bf16(low); }

// The twins of mma.sync: the same lanes hold the same elements; the sum of all products and c is exact but for one
// rounding.  `K` terms, of which a register holds `K / 8` neighbours.
template <unsigned K>
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto part = [](uint32_t word, unsigned k) -> double {
    return bits_float(K == 8 ? word : k % 2 ? word & 0xffff0000u : word << 16);
  };
  auto& me = host::self;
  auto& warp = *me.warp;
  const unsigned l = me.lane, g = l / 4, t = l % 4;
  warp.a[0][l] = a0, warp.a[1][l] = a1, warp.a[2][l] = a2, warp.a[3][l] = a3;
  warp.b[0][l] = b0, warp.b[1][l] = b1;
  warp.barrier.wait();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned half = i / 2, column = 2 * t + i % 2;  // c0, c1: row g; c2, c3: row g + 8
    double sum = c[i];
    for (unsigned k = 0; k < K; ++k) {
      const unsigned second = k / (K / 2), lane = k % (K / 2) / (K / 8);
      sum += part(warp.a[half + second * 2][g * 4 + lane], k) * part(warp.b[second][column * 4 + lane], k);
    }
    c[i] = static_cast<float>(sum);
  }
  warp.barrier.wait();
}
// m16n8k8 and m16n8k16.
inline void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma<8>(c, a0, a1, a2, a3, b0, b1);
}
inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma<16>(c, a0, a1, a2, a3, b0, b1);
}

}  // namespace gradkern::cuda

inline void atomicAdd(unsigned long long* p, unsigned long long x) { __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
