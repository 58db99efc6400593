// A thin vector type over GCC/Clang vector extensions, one per ISA namespace.  Included after the ISA's target
// pragma.  It includes nothing itself, so that no inline function of a library is compiled for this ISA.
namespace {

template <class T>
struct Simd;

#define GK_SIMD(T, I)                                                                            \
  template <>                                                                                    \
  struct Simd<T> {                                                                               \
    static constexpr int VL = GK_VECTOR_BYTES / sizeof(T);                                       \
    typedef T vec __attribute__((vector_size(GK_VECTOR_BYTES)));                                 \
    typedef T vecu __attribute__((vector_size(GK_VECTOR_BYTES), aligned(sizeof(T)), may_alias)); \
    typedef I ivec __attribute__((vector_size(GK_VECTOR_BYTES)));                                \
  };
GK_SIMD(float, int32_t)
GK_SIMD(double, int64_t)
#undef GK_SIMD

template <class T>
using Vec = typename Simd<T>::vec;
template <class T>
using IVec = typename Simd<T>::ivec;

template <class T>
GK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::vecu*>(p);
}
template <class T>
GK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::vecu*>(p) = v;
}
template <class T>
GK_INLINE Vec<T> bcast(T x) {
  return x - Vec<T>{};  // x - 0 keeps -0 and NaN; one broadcast instruction
}

// The first `n` lanes as an all-ones mask.
template <class T>
GK_INLINE IVec<T> lanes(int64_t n) {
  IVec<T> iota{};
  for (int i = 0; i < Simd<T>::VL; ++i) iota[i] = i;
  typedef __typeof__(iota[0] + 0) I;
  return iota < (IVec<T>{} + static_cast<I>(n));
}
template <class T>
GK_INLINE Vec<T> keep(Vec<T> v, IVec<T> mask) {
  return (Vec<T>)((IVec<T>)v & mask);
}

// Store only the first n lanes; the rest of memory is not touched.
template <class T>
GK_INLINE void store_n(T* p, Vec<T> v, int64_t n) {
#if GK_INTRINSICS == GK_AVX512_INTRINSICS
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  else _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Sixteen lanes at a time as bits, for any vector length.  `alive` is ReLU's own test, !(x <= 0), so a NaN is alive,
// as in torch.
template <class T>
GK_INLINE uint32_t alive16(const T* x) {
#if GK_INTRINSICS == GK_AVX512_INTRINSICS
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_setzero_ps(), _CMP_NLE_UQ);
  } else {
    return _mm512_cmp_pd_mask(_mm512_loadu_pd(x), _mm512_setzero_pd(), _CMP_NLE_UQ) |
           (uint32_t(_mm512_cmp_pd_mask(_mm512_loadu_pd(x + 8), _mm512_setzero_pd(), _CMP_NLE_UQ)) << 8);
  }
#elif GK_INTRINSICS == GK_AVX_INTRINSICS
  if constexpr (sizeof(T) == 4) {
    const __m256 z = _mm256_setzero_ps();
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), z, _CMP_NLE_UQ))) |
           (uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + 8), z, _CMP_NLE_UQ))) << 8);
  }
#endif
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= uint32_t(!(x[i] <= T(0))) << i;
  return bits;
}

// Where x replaces the running maximum m: greater, or NaN (the last NaN wins, as in torch's max pools).
template <class T>
GK_INLINE uint32_t better16(const T* x, const T* m) {
#if GK_INTRINSICS == GK_AVX512_INTRINSICS
  if constexpr (sizeof(T) == 4) {
    const __m512 a = _mm512_loadu_ps(x);
    return _mm512_cmp_ps_mask(a, _mm512_loadu_ps(m), _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  }
#elif GK_INTRINSICS == GK_AVX_INTRINSICS
  if constexpr (sizeof(T) == 4) {
    uint32_t bits = 0;
    for (int h = 0; h < 2; ++h) {
      const __m256 a = _mm256_loadu_ps(x + 8 * h), b = _mm256_loadu_ps(m + 8 * h);
      const __m256 k = _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
      bits |= uint32_t(_mm256_movemask_ps(k)) << (8 * h);
    }
    return bits;
  }
#endif
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= uint32_t(x[i] > m[i] || x[i] != x[i]) << i;
  return bits;
}

// Append the channel indices of the set bits to the list; returns how many.  May write 16 entries past the end.
GK_INLINE int64_t append(uint16_t* list, uint32_t bits, int64_t base) {
#if GK_INTRINSICS == GK_AVX512_INTRINSICS
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i c = _mm512_maskz_compress_epi32((__mmask16)bits, _mm512_add_epi32(iota, _mm512_set1_epi32((int)base)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(list), _mm512_cvtepi32_epi16(c));
  return __builtin_popcount(bits);
#else
  int64_t n = 0;
  for (; bits; bits &= bits - 1) list[n++] = static_cast<uint16_t>(base + __builtin_ctz(bits));
  return n;
#endif
}

}  // namespace
