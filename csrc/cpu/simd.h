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

// Store only the first n lanes, fewer than all; the rest of memory is not touched.
template <class T>
GK_INLINE void store_n(T* p, Vec<T> v, int64_t n) {
#if GK_INTRINSICS == GK_AVX512_INTRINSICS
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
  else _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), (__m512d)v);
#elif GK_INTRINSICS == GK_AVX_INTRINSICS
  // Halves, quarters and single lanes, because a masked store of AVX takes tens of cycles on some processors.
  if constexpr (sizeof(T) == 4) {
    __m128 part = _mm256_castps256_ps128((__m256)v);
    if (n & 4) {
      _mm_storeu_ps(p, part);
      part = _mm256_extractf128_ps((__m256)v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
      part = _mm_movehl_ps(part, part);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, part);
  } else {
    __m128d part = _mm256_castpd256_pd128((__m256d)v);
    if (n & 2) {
      _mm_storeu_pd(p, part);
      part = _mm256_extractf128_pd((__m256d)v, 1);
      p += 2;
    }
    if (n & 1) _mm_store_sd(p, part);
  }
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// ---- comparisons: a mask of lanes, in the form that the instruction set compares into -------------------------

#if GK_INTRINSICS == GK_AVX512_INTRINSICS
template <class T>
using Mask = uint32_t;  // a bit per lane

template <class T>
GK_INLINE uint32_t bits(Mask<T> mask) {
  return mask;
}
template <class T>
GK_INLINE Vec<T> choose(Mask<T> mask, Vec<T> yes, Vec<T> no) {
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_mask_mov_ps((__m512)no, (__mmask16)mask, (__m512)yes);
  else return (Vec<T>)_mm512_mask_mov_pd((__m512d)no, (__mmask8)mask, (__m512d)yes);
}
// ReLU's own test, !(x <= 0), so a NaN is alive, as in torch.
template <class T>
GK_INLINE Mask<T> alive(Vec<T> x) {
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NLE_UQ);
  else return _mm512_cmp_pd_mask((__m512d)x, _mm512_setzero_pd(), _CMP_NLE_UQ);
}
// Where x replaces the running maximum m: greater, or NaN (the last NaN wins, as in torch's max pools).
template <class T>
GK_INLINE Mask<T> better(Vec<T> x, Vec<T> m) {
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)m, _CMP_GT_OQ) |
           _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  else
    return _mm512_cmp_pd_mask((__m512d)x, (__m512d)m, _CMP_GT_OQ) |
           _mm512_cmp_pd_mask((__m512d)x, (__m512d)x, _CMP_UNORD_Q);
}
#else
template <class T>
using Mask = IVec<T>;  // all ones or zeros in each lane

template <class T>
GK_INLINE uint32_t bits(Mask<T> mask) {
#if GK_INTRINSICS == GK_AVX_INTRINSICS
  if constexpr (sizeof(T) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
  else return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#elif GK_INTRINSICS == GK_NEON_INTRINSICS
  if constexpr (sizeof(T) == 4) return vaddvq_u32((uint32x4_t)mask & uint32x4_t{1, 2, 4, 8});
  else return static_cast<uint32_t>(vaddvq_u64((uint64x2_t)mask & uint64x2_t{1, 2}));
#else
  uint32_t found = 0;
  for (int i = 0; i < Simd<T>::VL; ++i) found |= uint32_t(mask[i] & 1) << i;
  return found;
#endif
}
template <class T>
GK_INLINE Vec<T> choose(Mask<T> mask, Vec<T> yes, Vec<T> no) {
  return (Vec<T>)(((IVec<T>)yes & mask) | ((IVec<T>)no & ~mask));
}
// ReLU's own test, !(x <= 0), so a NaN is alive, as in torch.
template <class T>
GK_INLINE Mask<T> alive(Vec<T> x) {
  return ~(x <= Vec<T>{});
}
// Where x replaces the running maximum m: greater, or NaN (the last NaN wins, as in torch's max pools).
template <class T>
GK_INLINE Mask<T> better(Vec<T> x, Vec<T> m) {
  return (x > m) | (x != x);
}
#endif

// The places of the set bits in a byte, in order, and their number.
struct BitPlaces {
  uint8_t at[256][8] = {};
  uint8_t count[256] = {};
  constexpr BitPlaces() {
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0; i < 8; ++i)
        if (byte >> i & 1) at[byte][count[byte]++] = static_cast<uint8_t>(i);
  }
};
constexpr BitPlaces kBitPlaces;

// Append the channel indices of the set bits to the list; returns how many.  May write 16 entries past the end.
GK_INLINE int64_t append(uint16_t* list, uint32_t bits, int64_t base) {
#if GK_INTRINSICS == GK_AVX512_INTRINSICS
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i c = _mm512_maskz_compress_epi32((__mmask16)bits, _mm512_add_epi32(iota, _mm512_set1_epi32((int)base)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(list), _mm512_cvtepi32_epi16(c));
  return __builtin_popcount(bits);
#else
  int64_t n = 0;
  for (int half = 0; bits; ++half, bits >>= 8) {
    const uint8_t* at = kBitPlaces.at[bits & 255];
    uint16_t places[8];
    for (int i = 0; i < 8; ++i) places[i] = static_cast<uint16_t>(base + 8 * half + at[i]);
    __builtin_memcpy(list + n, places, sizeof places);
    n += kBitPlaces.count[bits & 255];
  }
  return n;
#endif
}

}  // namespace
