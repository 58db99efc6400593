// Statistics of attributions over samples; included once per ISA, like body.h.
namespace {

// One number for each double of a vector.
template <class T>
GK_INLINE Vec<double> widened(const T* p) {
  typedef T part
      __attribute__((vector_size(GK_VECTOR_BYTES / sizeof(double) * sizeof(T)), aligned(sizeof(T)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const part*>(p), Vec<double>);
}
GK_INLINE Vec<double> magnitude(Vec<double> v) {
  return (Vec<double>)((IVec<double>)v & (IVec<double>{} + INT64_MAX));  // without the sign
}
GK_INLINE double magnitude(double v) { return __builtin_fabs(v); }

// Adds f(row[e]) of all samples to to[e], with the sums of a few vectors in registers.
template <class T, class F>
GK_INLINE void add_each(const StatisticsArgs<T>& a, double* to, int64_t begin, int64_t end, const F& f) {
  constexpr int VL = Simd<double>::VL, P = 4;
  int64_t e = begin;
  for (; e + P * VL <= end; e += P * VL) {
    Vec<double> sums[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sums[p] = load<double>(to + e + p * VL);
    for (int64_t n = 0; n < a.samples; ++n) {
      if (a.keep && !a.keep[n]) continue;
      const T* row = a.rows + n * a.size + e;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[p] += f(widened(row + p * VL));
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) store<double>(to + e + p * VL, sums[p]);
  }
  for (; e < end; ++e)
    for (int64_t n = 0; n < a.samples; ++n)
      if (!a.keep || a.keep[n]) to[e] += f(static_cast<double>(a.rows[n * a.size + e]));
}

template <class T>
void add_rows(const StatisticsArgs<T>& args, int64_t begin, int64_t end) {
  const StatisticsArgs<T> a = args;  // a copy, because writes could alias its fields
  if (a.sum && a.magnitude) add_each(a, a.sum, begin, end, [](auto v) { return magnitude(v); });
  if (a.sum && !a.magnitude) add_each(a, a.sum, begin, end, [](auto v) { return v; });
  if (a.square) add_each(a, a.square, begin, end, [](auto v) { return v * v; });
  if (a.abs) add_each(a, a.abs, begin, end, [](auto v) { return magnitude(v); });
  for (int64_t n = 0; n < a.samples; ++n) {
    if (a.keep && !a.keep[n]) continue;
    const T* row = a.rows + n * a.size;
    if (a.max)
      for (int64_t e = begin; e < end; ++e) {  // a NaN stays, as in torch.maximum
        const float v = static_cast<float>(__builtin_fabs(row[e]));
        a.max[e] = v > a.max[e] || v != v ? v : a.max[e];
      }
    if (a.group) {
      double* group = a.group + a.groups[n] * a.group_stride;
      for (int64_t e = begin; e < end; ++e) group[e] += __builtin_fabs(static_cast<double>(row[e]));
    }
  }
}

template <class T>
bool all_finite(const T* numbers, int64_t count) {
  constexpr int VL = Simd<T>::VL;
  IVec<T> bad{};
  int64_t e = 0;
  for (; e + VL <= count; e += VL) {
    const Vec<T> v = load<T>(numbers + e), nothing = v - v;  // NaN where v is Inf or NaN
    bad |= nothing != nothing;
  }
  bool good = true;
  for (int i = 0; i < VL; ++i) good &= bad[i] == 0;
  for (; e < count; ++e) good &= numbers[e] - numbers[e] == T(0);
  return good;
}

}  // namespace
