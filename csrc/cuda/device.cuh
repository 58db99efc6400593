// The environment of a kernel: CUDA's own keywords, or their host substitutes in ../host/shim.h, and a record
// function's view of its block: the samples, the seeds and the buffers. docs/architecture.md says what the letters of
// loops and operands stand for.
#pragma once
#include <cstdint>

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define GK_DEVICE __device__ __forceinline__
// A record's function, which is called and not inlined: inlined functions would share one kernel's registers, and the
// largest would make the others spill.
#define GK_RECORD __device__ __noinline__
#define GK_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define GK_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define GK_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "../host/runtime.h"
#endif

namespace gradkern::cuda {

constexpr int kWarp = 32;

// work.operator()<count>() for a count of 1 … Most that is known when the kernel runs.
template <int Most, class Work>
GK_DEVICE void with_count(int count, const Work& work) {
  if constexpr (Most > 1)
    if (count < Most) return with_count<Most - 1>(count, work);
  work.template operator()<Most>();
}

// Division by a constant divisor: a multiplication and a correction instead of twenty instructions.
// For 0 ≤ n < 2^31 the estimate is the quotient or one less.
struct Divider {
  int divisor;
  uint32_t magic;

  GK_DEVICE explicit Divider(int d) : divisor(d), magic(0xffffffffu / static_cast<uint32_t>(d)) {}
  GK_DEVICE int quotient(int n) const {
    const int estimate = static_cast<int>(__umulhi(static_cast<uint32_t>(n), magic));
    return estimate + (n - estimate * divisor >= divisor);
  }
  // n = quotient · divisor + rest.
  struct Parts {
    int quotient, rest;
  };
  GK_DEVICE Parts parts(int n) const {
    const int q = quotient(n);
    return {q, n - q * divisor};
  }
};

// The error's text, or null.  A reported error is also cleared from the runtime; otherwise torch would find it at its
// next call and blame that call.
inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Four neighbours, moved as pieces of 16 bytes, which must be aligned on the host, too.
template <class T>
struct alignas(16) Four {
  T v[4];
};
static_assert(alignof(float4) == 16);

template <class T>
GK_DEVICE Four<T> load4(const T* p) {
  return *reinterpret_cast<const Four<T>*>(p);
}
template <class T>
GK_DEVICE void store4(T* p, const Four<T>& x) {
  *reinterpret_cast<Four<T>*>(p) = x;
}

// Loads memory that is constant for the whole launch through the read-only path.
template <class T>
GK_DEVICE T fixed(const T* p) {
  return __ldg(p);
}
template <class T>
GK_DEVICE Four<T> fixed4(const T* p) {
  Four<T> x;
#pragma unroll
  for (unsigned k = 0; k < sizeof x / sizeof(float4); ++k) {
    const float4 piece = __ldg(reinterpret_cast<const float4*>(p) + k);
    __builtin_memcpy(reinterpret_cast<char*>(&x) + k * sizeof piece, &piece, sizeof piece);
  }
  return x;
}

// The first `count` of four neighbours; `together`: there are four, and they are aligned.
template <class T>
GK_DEVICE Four<T> load_some(const T* p, int count, bool together) {
  if (together) return load4(p);
  Four<T> x{};
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k < count) x.v[k] = p[k];
  return x;
}
template <class T>
GK_DEVICE void store_some(T* p, const Four<T>& x, int count, bool together) {
  if (together) return store4(p, x);
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k < count) p[k] = x.v[k];
}

// A row of integers as the record of its kind.
template <class R>
GK_DEVICE const R& as(const Record& record) {
  static_assert(sizeof(R) <= sizeof(Record));
  return reinterpret_cast<const R&>(record);
}

template <class T>
struct Tile {
  const Args<T>& args;
  T* buf;
  int tile;       // number of the tile
  int first;      // the first current sample, within the tile
  int count;      // current samples
  int s0, seeds;  // current seeds

  // Position (h, w) of the current sample m: the place's stride between samples counts from the tile's first sample or,
  // if it is negative, from the first current sample.
  GK_DEVICE T* at(const Place& place, int m, int seed = 0, int h = 0, int w = 0) const {
    const int step = static_cast<int>(place.sample);
    return buf + static_cast<int>(place.offset) + (step >= 0 ? (first + m) * step : m * -step) +
           seed * static_cast<int>(place.seed) + h * static_cast<int>(place.row) + w * static_cast<int>(place.position);
  }
  // The row of the last weight that is the first cotangent of a seed.
  GK_DEVICE const T* seed_row(int m, int seed) const {
    return args.seed_rows + sample(m) * args.seed_rows_n + (s0 + seed) * args.seed_rows_s;
  }
  GK_DEVICE int64_t sample(int m) const { return static_cast<int64_t>(tile) * args.block + first + m; }
  GK_DEVICE int samples() const {
    const int64_t left = args.samples - static_cast<int64_t>(tile) * args.block;
    return left < args.block ? static_cast<int>(left) : args.block;
  }
  GK_DEVICE uint8_t* bits(const PatternRef& pattern, int m) const {
    auto* const all = reinterpret_cast<uint8_t*>(buf + args.workspace + args.planned * args.sample);
    return all + (first + m) * args.bits + static_cast<int>(pattern.bits);
  }
  GK_DEVICE int tid() const { return static_cast<int>(threadIdx.x); }
  GK_DEVICE int threads() const { return static_cast<int>(blockDim.x); }
  GK_DEVICE int warp() const { return tid() / kWarp; }
  GK_DEVICE int lane() const { return tid() % kWarp; }
  GK_DEVICE int warps() const { return threads() / kWarp; }
};

// The elements from a place's first position to another.
struct Steps {
  int row, position;

  GK_DEVICE explicit Steps(const Place& place)
      : row(static_cast<int>(place.row)), position(static_cast<int>(place.position)) {}
  GK_DEVICE int operator()(int h, int w) const { return h * row + w * position; }
};

// Whether everything that is read or written there can be moved four elements at a time.
GK_DEVICE bool by_fours(const Place& p) { return ((p.offset | p.sample | p.seed | p.row | p.position) & 3) == 0; }

// Pointers are generic on purpose: with __builtin_assume(__isShared(p)) nvcc 13.0 made code for quads and
// narrow windows that gave wrong sums on an H200 (benchmarks/notes-cuda.md, first run).
GK_DEVICE uint32_t half_word(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }

// An element in the caller's order [C][H][W].
struct Element {
  int c, h, w;
};
struct Order {
  int size;
  Divider plane, row;

  GK_DEVICE explicit Order(const Extent& extent)
      : size(static_cast<int>(extent.C * extent.H * extent.W)),
        plane(static_cast<int>(extent.H * extent.W)),
        row(static_cast<int>(extent.W)) {}
  GK_DEVICE Element of(int i) const {
    const auto channel = plane.parts(i), line = row.parts(channel.rest);
    return {channel.quotient, line.quotient, line.rest};
  }
};

// Calls each(m, s, e) for element e of `size`, of every copy s of every current sample m.
template <class T, class Each>
GK_DEVICE void over_copies(const Tile<T>& t, int copies, int size, const Each& each) {
  const Divider elements(size), samples(copies);
  for (int i = t.tid(); i < t.count * copies * size; i += t.threads()) {
    const auto [ms, e] = elements.parts(i);
    const auto [m, s] = samples.parts(ms);
    each(m, s, e);
  }
}

// Calls each(m, s, h, r) for number r of row h, all channels and columns of which are contiguous.
template <class T, class Each>
GK_DEVICE void over_rows(const Extent& extent, const Tile<T>& t, int copies, const Each& each) {
  const int width = extent.W * extent.C;
  const Divider rows(width);
  over_copies(t, copies, static_cast<int>(extent.H) * width, [&](int m, int s, int e) {
    const auto [h, r] = rows.parts(e);
    each(m, s, h, r);
  });
}

// The position that tap (jh, jw) of pool output (h, w) reads, or false outside.
GK_DEVICE bool tap_position(const PatternRef& p, int h, int w, int jh, int jw, int& hi, int& wi) {
  hi = h * static_cast<int>(p.sh) - static_cast<int>(p.ph) + jh * static_cast<int>(p.dh);
  wi = w * static_cast<int>(p.sw) - static_cast<int>(p.pw) + jw * static_cast<int>(p.dw);
  return hi >= 0 && hi < static_cast<int>(p.H) && wi >= 0 && wi < static_cast<int>(p.W);
}

}  // namespace gradkern::cuda
