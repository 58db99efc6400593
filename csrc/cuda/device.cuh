// The environment of a kernel: CUDA's own keywords, or their host substitutes in ../host/shim.h.
#pragma once
#include <cstdint>

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

// Four neighbours, moved as 16-byte pieces.
template <class T>
struct Four {
  T v[4];
};

GK_DEVICE Four<float> load4(const float* p) {
  const float4 a = *reinterpret_cast<const float4*>(p);
  return {{a.x, a.y, a.z, a.w}};
}
GK_DEVICE Four<double> load4(const double* p) {
  const double2 a = *reinterpret_cast<const double2*>(p), b = *reinterpret_cast<const double2*>(p + 2);
  return {{a.x, a.y, b.x, b.y}};
}
GK_DEVICE void store4(float* p, const Four<float>& x) {
  *reinterpret_cast<float4*>(p) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
}
GK_DEVICE void store4(double* p, const Four<double>& x) {
  *reinterpret_cast<double2*>(p) = make_double2(x.v[0], x.v[1]);
  *reinterpret_cast<double2*>(p + 2) = make_double2(x.v[2], x.v[3]);
}

// Loads memory that is constant for the whole launch through the read-only path.
template <class T>
GK_DEVICE T fixed(const T* p) {
  return __ldg(p);
}
GK_DEVICE Four<float> fixed4(const float* p) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(p));
  return {{a.x, a.y, a.z, a.w}};
}
GK_DEVICE Four<double> fixed4(const double* p) {
  const double2 a = __ldg(reinterpret_cast<const double2*>(p)), b = __ldg(reinterpret_cast<const double2*>(p + 2));
  return {{a.x, a.y, b.x, b.y}};
}

}  // namespace gradkern::cuda
