// DeepLift's rescale rule, one number at a time, for host and device.
//
// `z` is the input of a ReLU, a max pool, or a ReLU before a max pool.  Names with 1 are values at the input, names
// with 0 those at the reference. A place in a pool's padding holds minus infinity, which never wins a window; neither
// does NaN.
#pragma once
#include "elementwise.h"

namespace gradkern {

// A max pool over planes [H][W] (a 1-D one has H = 1).
struct Pool {
  int64_t H, W, kh, kw, sh, sw, ph, pw, dh, dw, oh, ow;
};

// The arguments for DeepLift's multipliers of a ReLU, of a max pool, or of a pool with a ReLU before it.
template <class T>
struct RescaleArgs {
  const T* z;        // [N][C][H][W]
  const T* ref;      // [N or 1][C][H][W]
  T* out;            // [taps][N][C][oh][ow], or [N][C][H][W] without a pool
  T* scratch;        // 4 ow + 2 taps ow numbers for each CPU thread
  int64_t ref_rows;  // 1 if one reference serves all samples
  int64_t channels;
  int64_t out_tap;
  Pool pool;
  bool relu;
  T eps;
};

template <class T>
GK_HD T outside() {
  return T(-INFINITY);
}

template <bool Relu, class T>
GK_HD T rectified(T z) {
  return (Relu & (z < T(0))) ? T(0) : z;
}

// The secant of a ReLU between reference and input, or the derivative if the two hardly differ, or are the same
// infinity.
template <class T>
GK_HD T secant(T z1, T z0, T eps) {
  const T dz = z1 - z0, dx = rectified<true>(z1) - rectified<true>(z0);
  const bool flat = (std::abs(dz) < eps) | (z1 == z0);
  return flat ? (z1 > T(0) ? T(1) : T(0)) : dx / (flat ? T(1) : dz);
}

// Adds a place of a window: `top` is the largest number so far, and `at` is its place (the first of equals).
template <bool Relu, class T>
GK_HD void contend(T z, T place, T& top, T& at) {
  const T x = z > outside<T>() ? rectified<Relu>(z) : z, t = top, a = at;
  at = x > t ? place : a;
  top = x > t ? x : t;
}

// The share of a window's multiplier that goes to one place.  The window's change goes to the place of the input's
// maximum `y1` (`here`) and to that of the reference's `y0` (`there`), each divided by the change of the place.  A
// place that hardly changes gets the derivative at the input.
template <bool Relu, class T>
GK_HD T share(T z1, T z0, T y1, T y0, bool here, bool there, T eps) {
  const bool real = z1 > outside<T>();
  const T peak = y1 > y0 ? y1 : y0;
  const T change = (here ? peak - y0 : T(0)) + (there ? y1 - peak : T(0));
  const T dx = real ? rectified<Relu>(z1) - rectified<Relu>(z0) : T(0);
  const bool still = std::abs(dx) < eps;
  const T pooled = still ? (here ? T(1) : T(0)) : change / (still ? T(1) : dx);
  const T multiplier = Relu ? pooled * secant(z1, z0, eps) : pooled;
  return real ? multiplier : T(0);
}

}  // namespace gradkern
