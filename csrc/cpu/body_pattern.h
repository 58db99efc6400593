// Records of patterns: ReLU, max pool or both, and the cotangents that they pass.  Included by body.h.

// ReLU, max pool, or both, as bits: plane j of output q holds the channels whose maximum is alive and came from
// tap j.

// The position that tap (jh, jw) of pool output (h, w) reads, or false outside.
GK_INLINE bool tap_position(const PatternRef& p, int64_t h, int64_t w, int64_t jh, int64_t jw, int64_t& hi,
                            int64_t& wi) {
  hi = h * p.sh - p.ph + jh * p.dh;
  wi = w * p.sw - p.pw + jw * p.dw;
  return hi >= 0 && hi < p.H && wi >= 0 && wi < p.W;
}

// One output position.  `taps`: the addresses that lie inside the input, in order; `planes`: where the bits of each go.
// With a constant `count` everything stays in registers.
template <class T>
GK_INLINE void pattern_position(const PatternRecord& op, const T* const* taps, uint8_t* const* planes, int count,
                                T* y) {
  constexpr int VL = Simd<T>::VL;
  for (int64_t c = 0; c < op.extent.C; c += 16) {
    const int64_t left = op.extent.C - c;
    uint32_t wins[kMaxTaps], open = 0;
    for (int j = 0; j < count; ++j) wins[j] = 0;
#pragma GCC unroll 8
    for (int v = 0; v < 16; v += VL) {
      if (v >= left) break;
      Vec<T> m = count ? load<T>(taps[0] + c + v) : bcast<T>(-__builtin_inff());
#pragma GCC unroll 4
      for (int j = 1; j < count; ++j) {
        const Vec<T> x = load<T>(taps[j] + c + v);
        const Mask<T> k = better<T>(x, m);
        wins[j] |= bits<T>(k) << v;
        m = choose<T>(k, x, m);
      }
      if (op.relu) {
        const Mask<T> k = alive<T>(m);
        open |= bits<T>(k) << v;
        m = choose<T>(k, m, Vec<T>{});
      }
      left - v >= VL ? store<T>(y + c + v, m) : store_n<T>(y + c + v, m, left - v);
    }
    const uint32_t live = left < 16 ? (1u << left) - 1 : 0xffffu;
    open = op.relu ? open & live : live;
    // The last replacement won; without one, the first tap did.
#pragma GCC unroll 4
    for (int j = count - 1; j >= 0; --j) {
      const uint16_t word = static_cast<uint16_t>(j ? open & wins[j] : open);
      open &= ~uint32_t(word);
      __builtin_memcpy(planes[j] + c / 8, &word, 2);
    }
  }
}

template <class T>
void run_pattern(const PatternRecord& op, Context<T>& ctx, int64_t n) {
  const PatternRef& p = op.pattern;
  const T* src = at(ctx, op.src, n);
  uint8_t* plane = ctx.bits + p.bits + n * ctx.bits_sample;
  const T* taps[kMaxTaps];
  uint8_t* planes[kMaxTaps];
  for (int64_t h = 0; h < op.extent.H; ++h)
    for (int64_t w = 0; w < op.extent.W; ++w) {
      int count = 0;
      for (int64_t jh = 0; jh < p.kh; ++jh)
        for (int64_t jw = 0; jw < p.kw; ++jw, plane += p.plane_bytes) {
          int64_t hi, wi;
          if (tap_position(p, h, w, jh, jw, hi, wi)) {
            taps[count] = src + hi * op.src.row + wi * op.src.position;
            planes[count++] = plane;
          } else {
            __builtin_memset(plane, 0, p.plane_bytes);
          }
        }
      T* y = at(ctx, op.dst, n) + h * op.dst.row + w * op.dst.position;
      switch (count) {
        case 1: pattern_position<T>(op, taps, planes, 1, y); break;
        case 2: pattern_position<T>(op, taps, planes, 2, y); break;
        case 4: pattern_position<T>(op, taps, planes, 4, y); break;
        default: pattern_position<T>(op, taps, planes, count, y);
      }
    }
}

// A pattern applied to a dense destination: routed cotangents are added, and the rest stays unchanged.
template <class T>
void run_pattern_t(const PatternTRecord& op, Context<T>& ctx, int64_t n) {
  const uint8_t* bits = ctx.bits + op.pattern.bits + n * ctx.bits_sample;
  for (int64_t h = 0; h < op.extent.H; ++h)
    for (int64_t w = 0; w < op.extent.W; ++w) {
      if (!row_is_live(ctx, h) || !column_is_live(ctx, w)) continue;
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
