// DeepLift's multipliers: a thread per window of a max pool, or per unit of a ReLU.  ../rescale_rule.h has the rule.
#pragma once
#include "../rescale_rule.h"
#include "device.cuh"

namespace gradkern::cuda {

constexpr int kRescaleThreads = 256;

template <class T, bool Relu>
GK_KERNEL(kRescaleThreads, 1)
rescale_kernel(const __grid_constant__ RescaleArgs<T> a, uint32_t windows) {
  // 32-bit, as 64-bit divisions would be most of the work.
  const int H = a.pool.H, W = a.pool.W, kh = a.pool.kh, kw = a.pool.kw, ow = a.pool.ow, area = a.pool.oh * ow;
  const int channels = a.channels;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < windows; i += gridDim.x * blockDim.x) {
    const int row = static_cast<int>(i) / area, o = static_cast<int>(i) - row * area;
    const int h0 = o / ow * a.pool.sh - a.pool.ph, w0 = o % ow * a.pool.sw - a.pool.pw;
    const T* z = a.z + static_cast<int64_t>(row) * H * W;
    const T* ref = a.ref + static_cast<int64_t>(a.ref_rows == 1 ? row % channels : row) * H * W;
    // Calls f(place, z1, z0) for all places of the window, padding included.
    const auto each = [&](const auto& f) {
      for (int place = 0; place < kh * kw; ++place) {
        const int h = h0 + place / kw * a.pool.dh, w = w0 + place % kw * a.pool.dw;
        const bool inside = h >= 0 && h < H && w >= 0 && w < W;
        f(static_cast<T>(place), inside ? fixed(z + h * W + w) : outside<T>(),
          inside ? fixed(ref + h * W + w) : outside<T>());
      }
    };
    T top = outside<T>(), top_ref = outside<T>(), at = T(-1), at_ref = T(-1);
    each([&](T place, T z1, T z0) {
      contend<Relu>(z1, place, top, at);
      contend<Relu>(z0, place, top_ref, at_ref);
    });
    T* out = a.out + i;
    each([&](T place, T z1, T z0) {
      *out = share<Relu>(z1, z0, top, top_ref, at == place, at_ref == place, a.eps);
      out += a.out_tap;
    });
  }
}

template <class T>
GK_KERNEL(kRescaleThreads, 1)
secant_kernel(const __grid_constant__ RescaleArgs<T> a, uint32_t units) {
  const uint32_t sample = static_cast<uint32_t>(a.channels * a.pool.H * a.pool.W);
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < units; i += gridDim.x * blockDim.x)
    a.out[i] = secant(fixed(a.z + i), fixed(a.ref + (a.ref_rows == 1 ? i % sample : i)), a.eps);
}

}  // namespace gradkern::cuda
