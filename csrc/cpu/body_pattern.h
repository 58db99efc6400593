// Records of patterns: ReLU, max pool or both, and what they let through.  Included by body.h.

// ReLU, max pool, or both, as bits: plane j of output q holds the channels whose maximum is alive and came from
// tap j.

// One output position and 16 channels, any window: x(j) gives tap j's address or null outside the input.
template <class T, class Tap>
GK_INLINE void pattern16(const Op& op, int64_t c, const Tap& tap, T* y, uint8_t* planes) {
  constexpr int VL = Simd<T>::VL;
  const int64_t left = op.C - c < 16 ? op.C - c : 16;
  uint16_t wins[256];
  T m[16];
  int64_t first = -1;
  for (int64_t i = 0; i < 16; ++i) m[i] = -__builtin_inff();
  for (int64_t j = 0; j < op.taps; ++j) {
    const T* x = tap(j);
    wins[j] = 0;
    if (!x) continue;
    const uint32_t k = better16<T>(x + c, m);
    wins[j] = static_cast<uint16_t>(k);
    if (first < 0) first = j;
    for (int64_t i = 0; i < 16; ++i) m[i] = (k >> i) & 1 ? x[c + i] : m[i];
  }
  uint32_t open = (1u << left) - 1;
  if (op.relu) {
    open &= alive16<T>(m);
    for (int v = 0; v < 16; v += VL) {
      const Vec<T> x = load<T>(m + v);
      store<T>(m + v, keep<T>(x, ~(x <= Vec<T>{})));
    }
  }
  // The last replacement won; where nothing ever beat -inf, the first tap did.
  uint32_t dead = ~open;
  for (int64_t j = op.taps - 1; j >= 0; --j) {
    uint32_t k = wins[j] & ~dead;
    dead |= k;
    if (j == first) k |= ~dead & 0xffff;
    const uint16_t word = static_cast<uint16_t>(k);
    __builtin_memcpy(planes + j * op.nb + c / 8, &word, 2);
  }
  __builtin_memcpy(y + c, m, left * sizeof(T));
}

#if GK_ISA == 512
// The same for float windows of at most four taps that lie inside: everything in registers.
template <int Taps>
GK_INLINE void pattern_inside(const Op& op, const float* const* taps, float* y, uint8_t* planes) {
  for (int64_t c = 0; c < op.C; c += 16) {
    const __mmask16 lanes = op.C - c < 16 ? (__mmask16)((1u << (op.C - c)) - 1) : (__mmask16)0xffff;
    __mmask16 win[Taps];
    __m512 m = _mm512_maskz_loadu_ps(lanes, taps[0] + c);
    win[0] = 0xffff;
#pragma GCC unroll 4
    for (int j = 1; j < Taps; ++j) {
      const __m512 x = _mm512_maskz_loadu_ps(lanes, taps[j] + c);
      win[j] = _mm512_cmp_ps_mask(x, m, _CMP_GT_OQ) | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      m = _mm512_mask_mov_ps(m, win[j], x);
    }
    __mmask16 open = lanes;
    if (op.relu) {
      open &= _mm512_cmp_ps_mask(m, _mm512_setzero_ps(), _CMP_NLE_UQ);
      m = _mm512_maskz_mov_ps(open, m);
    }
#pragma GCC unroll 4
    for (int j = Taps - 1; j >= 0; --j) {
      const uint16_t word = open & win[j];
      open &= ~win[j];
      __builtin_memcpy(planes + j * op.nb + c / 8, &word, 2);
    }
    _mm512_mask_storeu_ps(y + c, lanes, m);
  }
}
#endif

template <class T>
void run_pattern(const Op& op, Context<T>& ctx, int64_t n) {
  const T* src = GK_SRC(n);
  uint8_t* planes = ctx.bits + op.bits + n * op.bits_n;
  const T* taps[256];
  for (int64_t h = 0; h < op.H; ++h)
    for (int64_t w = 0; w < op.W; ++w, planes += op.taps * op.nb) {
      T* y = GK_DST(n) + h * op.dst_row + w * op.dst_px;
      bool inside = true;
      const T** tap = taps;
      for (int64_t jh = 0; jh < op.kh; ++jh)
        for (int64_t jw = 0; jw < op.kw; ++jw) {
          const int64_t hi = h * op.sh - op.ph + jh * op.dh, wi = w * op.sw - op.pw + jw * op.dw;
          const bool in = hi >= 0 && hi < op.Hi && wi >= 0 && wi < op.Wi;
          inside &= in;
          *tap++ = in ? src + hi * op.src_row + wi * op.src_px : nullptr;
        }
#if GK_ISA == 512
      if constexpr (sizeof(T) == 4)
        if (inside) {
          if (op.taps == 1) {
            pattern_inside<1>(op, taps, y, planes);
            continue;
          }
          if (op.taps == 2) {
            pattern_inside<2>(op, taps, y, planes);
            continue;
          }
          if (op.taps == 3) {
            pattern_inside<3>(op, taps, y, planes);
            continue;
          }
          if (op.taps == 4) {
            pattern_inside<4>(op, taps, y, planes);
            continue;
          }
        }
#endif
      for (int64_t c = 0; c < op.C; c += 16) pattern16<T>(op, c, [&](int64_t j) { return taps[j]; }, y, planes);
    }
}

// The position that tap (jh, jw) of pool output (h, w) reads, or false outside.
GK_INLINE bool tap_position(const Op& op, int64_t h, int64_t w, int64_t jh, int64_t jw, int64_t& hi, int64_t& wi) {
  hi = h * op.sh - op.ph + jh * op.dh;
  wi = w * op.sw - op.pw + jw * op.dw;
  return hi >= 0 && hi < op.Hi && wi >= 0 && wi < op.Wi;
}

// A pattern applied to a dense destination: what was routed moves, the rest stays as it is.
template <class T>
void run_expand(const Op& op, Context<T>& ctx, int64_t n) {
  const uint8_t* planes = ctx.bits + op.bits + n * op.bits_n;
  for (int64_t h = 0; h < op.H; ++h)
    for (int64_t w = 0; w < op.W; ++w)
      for (int64_t jh = 0; jh < op.kh; ++jh)
        for (int64_t jw = 0; jw < op.kw; ++jw, planes += op.nb) {
          int64_t hi, wi;
          if (!tap_position(op, h, w, jh, jw, hi, wi)) continue;
          const T* g = GK_SRC(n) + h * op.src_row + w * op.src_px;
          T* y = GK_DST(n) + hi * op.dst_row + wi * op.dst_px;
          for (int64_t c = 0; c < op.C; c += 16) {
            uint16_t word;
            __builtin_memcpy(&word, planes + c / 8, 2);
            uint16_t out[32];
            const int64_t count = append(out, word, c);
            for (int64_t s = 0; s < ctx.seeds; ++s)
              for (int64_t i = 0; i < count; ++i) y[s * op.dst_s + out[i]] += g[s * op.src_s + out[i]];
          }
        }
}
