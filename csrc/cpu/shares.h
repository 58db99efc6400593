// DeepLift's shares of a max pool (with or without a ReLU before it), row by row; included once per ISA, like body.h.
//
// For every window and place: how much of the window's multiplier goes to that place.  `z` and `ref` are what enters
// the ReLU (or the pool): a window's change from the reference goes to where the input's maximum is and to where the
// reference's was, each divided by its own change; a place that hardly changes gets the derivative at the input.

// The arrays of a loop do not overlap.
#ifdef __clang__
#define GK_APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define GK_APART _Pragma("GCC ivdep")
#endif

template <class T, bool Relu>
void share_rows(const SharesArgs<T>& a, int64_t begin, int64_t end) {
  const Pool p = a.pool;  // copies: what is written could alias what `a` points to
  const T eps = a.eps;
  const int64_t taps = p.kh * p.kw, plane = p.H * p.W, area = p.oh * p.ow;
  T* const top = a.scratch;  // per window of one output row
  T* const top_ref = top + p.ow;
  T* const at = top_ref + p.ow;
  T* const at_ref = at + p.ow;
  T* const v = at_ref + p.ow;  // [taps][ow], before the ReLU
  T* const r = v + taps * p.ow;
  const T none = -std::numeric_limits<T>::infinity();
  for (int64_t row = begin; row < end; ++row) {
    const T* z = a.z + row * plane;
    const T* zr = a.ref + (a.ref_rows == 1 ? row % a.channels : row) * plane;
    for (int64_t oh = 0; oh < p.oh; ++oh) {
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t h = oh * p.sh - p.ph + (t / p.kw) * p.dh, first = (t % p.kw) * p.dw - p.pw;
        T* const vt = v + t * p.ow;
        T* const rt = r + t * p.ow;
        for (int64_t o = 0; o < p.ow; ++o) vt[o] = rt[o] = none;
        if (h < 0 || h >= p.H) continue;
        const int64_t from = first < 0 ? (-first + p.sw - 1) / p.sw : 0;
        const int64_t fit = first < p.W ? (p.W - 1 - first) / p.sw + 1 : 0, to = fit < p.ow ? fit : p.ow;
        const T* const zt = z + h * p.W + first;
        const T* const zrt = zr + h * p.W + first;
        GK_APART
        for (int64_t o = from; o < to; ++o) vt[o] = zt[o * p.sw];
        GK_APART
        for (int64_t o = from; o < to; ++o) rt[o] = zrt[o * p.sw];
      }
      for (int64_t o = 0; o < p.ow; ++o) top[o] = top_ref[o] = none, at[o] = at_ref[o] = T(-1);
      for (int64_t t = 0; t < taps; ++t) {
        const T* const vt = v + t * p.ow;
        const T* const rt = r + t * p.ow;
        const T place = static_cast<T>(t);
        GK_APART
        for (int64_t o = 0; o < p.ow; ++o) {  // the ReLU keeps padding at -inf: it never wins
          const T x = Relu & (vt[o] < T(0)) & (vt[o] > none) ? T(0) : vt[o];
          const T y = Relu & (rt[o] < T(0)) & (rt[o] > none) ? T(0) : rt[o];
          const T a0 = at[o], t0 = top[o], a1 = at_ref[o], t1 = top_ref[o];
          at[o] = x > t0 ? place : a0;
          top[o] = x > t0 ? x : t0;
          at_ref[o] = y > t1 ? place : a1;
          top_ref[o] = y > t1 ? y : t1;
        }
      }
      for (int64_t t = 0; t < taps; ++t) {
        const T* const vt = v + t * p.ow;
        const T* const rt = r + t * p.ow;
        const T place = static_cast<T>(t);
        T* const out = a.out + t * a.out_tap + row * area + oh * p.ow;
        GK_APART
        for (int64_t o = 0; o < p.ow; ++o) {
          const T y1 = top[o], y0 = top_ref[o], z1 = vt[o], z0 = rt[o], a1 = at[o], a0 = at_ref[o];
          const T peak = y1 > y0 ? y1 : y0;
          const T share = (a1 == place ? peak - y0 : T(0)) + (a0 == place ? y1 - peak : T(0));
          const bool real = z1 > none;
          const T dz = real ? z1 - z0 : T(0);
          const T x = Relu & (z1 < T(0)) ? T(0) : z1, y = Relu & (z0 < T(0)) ? T(0) : z0;
          const T dx = real ? x - y : T(0);
          const bool still = std::abs(dx) < eps, flat = std::abs(dz) < eps;
          const T pooled = still ? (a1 == place ? T(1) : T(0)) : share / (still ? T(1) : dx);
          const T secant = dx / (flat ? T(1) : dz);
          const T slope = flat ? (z1 > T(0) ? T(1) : T(0)) : secant;
          out[o] = real ? (Relu ? pooled * slope : pooled) : T(0);
        }
      }
    }
  }
}

template <class T>
void run_shares(const SharesArgs<T>& a, int64_t begin, int64_t end) {
  a.relu ? share_rows<T, true>(a, begin, end) : share_rows<T, false>(a, begin, end);
}

// The secant of a ReLU from its reference, the derivative where the two hardly differ.
template <class T>
void run_secant(const SharesArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t plane = a.pool.H * a.pool.W;
  const T eps = a.eps;
  for (int64_t row = begin; row < end; ++row) {
    const T* z = a.z + row * plane;
    const T* zr = a.ref + (a.ref_rows == 1 ? row % a.channels : row) * plane;
    T* out = a.out + row * plane;
    for (int64_t i = 0; i < plane; ++i) {
      const T dz = z[i] - zr[i];
      const T dx = (z[i] < T(0) ? T(0) : z[i]) - (zr[i] < T(0) ? T(0) : zr[i]);
      const bool flat = (dz < T(0) ? -dz : dz) < eps;
      out[i] = flat ? (z[i] > T(0) ? T(1) : T(0)) : dx / (flat ? T(1) : dz);
    }
  }
}

#undef GK_APART
