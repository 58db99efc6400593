// DeepLift's multipliers: a thread per window of a max pool, or per unit of a ReLU.  ../rescale_rule.h has the rule.
#pragma once
#include "../rescale_rule.h"
#include "device.cuh"

namespace gradkern::cuda {

constexpr int kRescaleThreads = 256;

// The geometry that all windows share; 32-bit, as 64-bit divisions would be most of the work.
struct PoolPlan {
  int H, W, kh, kw, sh, sw, ph, pw, dh, dw, oh, ow;

  GK_DEVICE explicit PoolPlan(const Pool& p)
      : H(static_cast<int>(p.H)),
        W(static_cast<int>(p.W)),
        kh(static_cast<int>(p.kh)),
        kw(static_cast<int>(p.kw)),
        sh(static_cast<int>(p.sh)),
        sw(static_cast<int>(p.sw)),
        ph(static_cast<int>(p.ph)),
        pw(static_cast<int>(p.pw)),
        dh(static_cast<int>(p.dh)),
        dw(static_cast<int>(p.dw)),
        oh(static_cast<int>(p.oh)),
        ow(static_cast<int>(p.ow)) {}
};

// One window over two planes: the input's and the reference's.
template <class T>
struct PoolWindow {
  const T* z;
  const T* ref;
  int h, w;  // of its first place

  // Calls `f(place, z1, z0)` for all places, padding included.
  template <class F>
  GK_DEVICE void each(const PoolPlan& p, const F& f) const {
    int place = 0;
    for (int jh = 0; jh < p.kh; ++jh)
      for (int jw = 0; jw < p.kw; ++jw, ++place) {
        const int y = h + jh * p.dh, x = w + jw * p.dw, at = y * p.W + x;
        const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
        f(place, inside ? fixed(z + at) : outside<T>(), inside ? fixed(ref + at) : outside<T>());
      }
  }
};

template <class T, bool Relu>
GK_KERNEL(kRescaleThreads, 1)
rescale_kernel(const __grid_constant__ RescaleArgs<T> a, uint32_t windows) {
  const PoolPlan p(a.pool);
  const uint32_t area = static_cast<uint32_t>(p.oh * p.ow), channels = static_cast<uint32_t>(a.channels);
  const int64_t plane = a.pool.H * a.pool.W;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < windows; i += gridDim.x * blockDim.x) {
    const uint32_t row = i / area, o = i - row * area, oh = o / static_cast<uint32_t>(p.ow);
    const uint32_t ow = o - oh * static_cast<uint32_t>(p.ow);
    const PoolWindow<T> window{a.z + row * plane, a.ref + (a.ref_rows == 1 ? row % channels : row) * plane,
                               static_cast<int>(oh) * p.sh - p.ph, static_cast<int>(ow) * p.sw - p.pw};
    T top = outside<T>(), top_ref = outside<T>(), at = T(-1), at_ref = T(-1);
    window.each(p, [&](int place, T z1, T z0) {
      contend<Relu>(z1, static_cast<T>(place), top, at);
      contend<Relu>(z0, static_cast<T>(place), top_ref, at_ref);
    });
    T* const out = a.out + i;
    window.each(p, [&](int place, T z1, T z0) {
      const T here = static_cast<T>(place);
      out[place * a.out_tap] = share<Relu>(z1, z0, top, top_ref, at == here, at_ref == here, a.eps);
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
