// DeepLift's shares of a max pool (with or without a ReLU before it), row by row; included once per ISA, like body.h.
//
// It computes the share of a window's multiplier that goes to each place of the window, by ../rescale_rule.h.

// The arrays of a loop do not overlap.
#ifdef __clang__
#define GK_APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define GK_APART _Pragma("GCC ivdep")
#endif

template <class T, bool Relu>
void rescale_rows(const RescaleArgs<T>& a, int64_t begin, int64_t end) {
  const Pool p = a.pool;  // copies, because writes could alias the fields of `a`
  const T eps = a.eps;
  const int64_t taps = p.kh * p.kw, plane = p.H * p.W, area = p.oh * p.ow;
  T* const top = a.scratch;  // per window of one output row
  T* const top_ref = top + p.ow;
  T* const at = top_ref + p.ow;
  T* const at_ref = at + p.ow;
  T* const values = at_ref + p.ow;  // [taps][ow], before the ReLU
  T* const values_ref = values + taps * p.ow;
  const T none = outside<T>();
  for (int64_t row = begin; row < end; ++row) {
    const T* z = a.z + row * plane;
    const T* z_ref = a.ref + (a.ref_rows == 1 ? row % a.channels : row) * plane;
    for (int64_t oh = 0; oh < p.oh; ++oh) {
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t h = oh * p.sh - p.ph + (t / p.kw) * p.dh, first = (t % p.kw) * p.dw - p.pw;
        T* const tap = values + t * p.ow;
        T* const tap_ref = values_ref + t * p.ow;
        for (int64_t o = 0; o < p.ow; ++o) tap[o] = tap_ref[o] = none;
        if (h < 0 || h >= p.H) continue;
        const int64_t from = first < 0 ? (-first + p.sw - 1) / p.sw : 0;
        const int64_t fit = first < p.W ? (p.W - 1 - first) / p.sw + 1 : 0, to = fit < p.ow ? fit : p.ow;
        const T* const z_tap = z + h * p.W + first;
        const T* const z_tap_ref = z_ref + h * p.W + first;
        GK_APART
        for (int64_t o = from; o < to; ++o) tap[o] = z_tap[o * p.sw];
        GK_APART
        for (int64_t o = from; o < to; ++o) tap_ref[o] = z_tap_ref[o * p.sw];
      }
      for (int64_t o = 0; o < p.ow; ++o) top[o] = top_ref[o] = none, at[o] = at_ref[o] = T(-1);
      for (int64_t t = 0; t < taps; ++t) {
        const T* const tap = values + t * p.ow;
        const T* const tap_ref = values_ref + t * p.ow;
        const T place = static_cast<T>(t);
        GK_APART
        for (int64_t o = 0; o < p.ow; ++o) {
          contend<Relu>(tap[o], place, top[o], at[o]);
          contend<Relu>(tap_ref[o], place, top_ref[o], at_ref[o]);
        }
      }
      for (int64_t t = 0; t < taps; ++t) {
        const T* const tap = values + t * p.ow;
        const T* const tap_ref = values_ref + t * p.ow;
        const T place = static_cast<T>(t);
        T* const out = a.out + t * a.out_tap + row * area + oh * p.ow;
        GK_APART
        for (int64_t o = 0; o < p.ow; ++o)
          out[o] = share<Relu>(tap[o], tap_ref[o], top[o], top_ref[o], at[o] == place, at_ref[o] == place, eps);
      }
    }
  }
}

template <class T>
void run_rescale(const RescaleArgs<T>& a, int64_t begin, int64_t end) {
  a.relu ? rescale_rows<T, true>(a, begin, end) : rescale_rows<T, false>(a, begin, end);
}

template <class T>
void run_secant(const RescaleArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t plane = a.pool.H * a.pool.W;
  const T eps = a.eps;
  for (int64_t row = begin; row < end; ++row) {
    const T* z = a.z + row * plane;
    const T* z_ref = a.ref + (a.ref_rows == 1 ? row % a.channels : row) * plane;
    T* out = a.out + row * plane;
    for (int64_t i = 0; i < plane; ++i) out[i] = secant(z[i], z_ref[i], eps);
  }
}

#undef GK_APART
