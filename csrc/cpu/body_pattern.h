// Records of patterns: ReLU, max pool or both, and the cotangents that they pass.  Included by body.h.

// ReLU, max pool, or both, as bits: plane j of output q holds the channels whose maximum is alive and came from
// tap j.

// One output position and 16 channels, any window: x(j) gives tap j's address or null outside the input.
template <class T, class Tap>
GK_INLINE void pattern16(const PatternRecord& op, int64_t c, const Tap& tap, T* y, uint8_t* planes) {
  constexpr int VL = Simd<T>::VL;
  const int64_t left = op.extent.C - c < 16 ? op.extent.C - c : 16;
  uint16_t wins[kMaxTaps];
  T m[16];
  int64_t first = -1;
  for (int64_t i = 0; i < 16; ++i) m[i] = -__builtin_inff();
  for (int64_t j = 0; j < op.pattern.taps; ++j) {
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
  // The last replacement won; if nothing was greater than -inf, the first tap did.
  uint32_t dead = ~open;
  for (int64_t j = op.pattern.taps - 1; j >= 0; --j) {
    uint32_t k = wins[j] & ~dead;
    dead |= k;
    if (j == first) k |= ~dead & 0xffff;
    const uint16_t word = static_cast<uint16_t>(k);
    __builtin_memcpy(planes + j * op.pattern.plane_bytes + c / 8, &word, 2);
  }
  __builtin_memcpy(y + c, m, left * sizeof(T));
}

#if GK_INTRINSICS == GK_AVX512_INTRINSICS
// The same for float windows of at most four taps that lie inside the input: everything stays in registers.
template <int Taps>
GK_INLINE void pattern_inside(const PatternRecord& op, const float* const* taps, float* y, uint8_t* planes) {
  for (int64_t c = 0; c < op.extent.C; c += 16) {
    const __mmask16 lanes = op.extent.C - c < 16 ? (__mmask16)((1u << (op.extent.C - c)) - 1) : (__mmask16)0xffff;
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
      __builtin_memcpy(planes + j * op.pattern.plane_bytes + c / 8, &word, 2);
    }
    _mm512_mask_storeu_ps(y + c, lanes, m);
  }
}
#endif

template <class T>
void run_pattern(const PatternRecord& op, Context<T>& ctx, int64_t n) {
  const T* src = at(ctx, op.src, n);
  uint8_t* planes = ctx.bits + op.pattern.bits + n * ctx.bits_sample;
  const T* taps[kMaxTaps];
  for (int64_t h = 0; h < op.extent.H; ++h)
    for (int64_t w = 0; w < op.extent.W; ++w, planes += op.pattern.taps * op.pattern.plane_bytes) {
      T* y = at(ctx, op.dst, n) + h * op.dst.row + w * op.dst.position;
      bool inside = true;
      const T** tap = taps;
      for (int64_t jh = 0; jh < op.pattern.kh; ++jh)
        for (int64_t jw = 0; jw < op.pattern.kw; ++jw) {
          const int64_t hi = h * op.pattern.sh - op.pattern.ph + jh * op.pattern.dh,
                        wi = w * op.pattern.sw - op.pattern.pw + jw * op.pattern.dw;
          const bool in = hi >= 0 && hi < op.pattern.H && wi >= 0 && wi < op.pattern.W;
          inside &= in;
          *tap++ = in ? src + hi * op.src.row + wi * op.src.position : nullptr;
        }
#if GK_INTRINSICS == GK_AVX512_INTRINSICS
      if constexpr (sizeof(T) == 4)
        if (inside) {
          if (op.pattern.taps == 1) {
            pattern_inside<1>(op, taps, y, planes);
            continue;
          }
          if (op.pattern.taps == 2) {
            pattern_inside<2>(op, taps, y, planes);
            continue;
          }
          if (op.pattern.taps == 3) {
            pattern_inside<3>(op, taps, y, planes);
            continue;
          }
          if (op.pattern.taps == 4) {
            pattern_inside<4>(op, taps, y, planes);
            continue;
          }
        }
#endif
      for (int64_t c = 0; c < op.extent.C; c += 16) pattern16<T>(op, c, [&](int64_t j) { return taps[j]; }, y, planes);
    }
}

// The position that tap (jh, jw) of pool output (h, w) reads, or false outside.
GK_INLINE bool tap_position(const PatternRef& p, int64_t h, int64_t w, int64_t jh, int64_t jw, int64_t& hi,
                            int64_t& wi) {
  hi = h * p.sh - p.ph + jh * p.dh;
  wi = w * p.sw - p.pw + jw * p.dw;
  return hi >= 0 && hi < p.H && wi >= 0 && wi < p.W;
}

// A pattern applied to a dense destination: routed cotangents are added, and the rest stays unchanged.
template <class T>
void run_pattern_t(const PatternTRecord& op, Context<T>& ctx, int64_t n) {
  const uint8_t* bits = ctx.bits + op.pattern.bits + n * ctx.bits_sample;
  for (int64_t h = 0; h < op.extent.H; ++h)
    for (int64_t w = 0; w < op.extent.W; ++w) {
      if (!row_lives(ctx, h) || !column_lives(ctx, w)) continue;
      const uint8_t* planes = bits + (h * op.extent.W + w) * op.pattern.taps * op.pattern.plane_bytes;
      for (int64_t jh = 0; jh < op.pattern.kh; ++jh)
        for (int64_t jw = 0; jw < op.pattern.kw; ++jw, planes += op.pattern.plane_bytes) {
          int64_t hi, wi;
          if (!tap_position(op.pattern, h, w, jh, jw, hi, wi)) continue;
          const T* g = at(ctx, op.src, n) + h * op.src.row + w * op.src.position;
          T* y = at(ctx, op.dst, n) + hi * op.dst.row + wi * op.dst.position;
          for (int64_t c = 0; c < op.extent.C; c += 16) {
            uint16_t word;
            __builtin_memcpy(&word, planes + c / 8, 2);
            uint16_t out[32];
            const int64_t count = append(out, word, c);
            for (int64_t s = 0; s < ctx.seeds; ++s)
              for (int64_t i = 0; i < count; ++i) y[s * op.dst.seed + out[i]] += g[s * op.src.seed + out[i]];
          }
        }
    }
}
