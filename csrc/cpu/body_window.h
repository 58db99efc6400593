// Records of contractions, forward and for all seeds backward.  Included by body.h.

// A convolution or a linear layer, of one sample or of the whole block.
template <class T>
void run_window(const WindowRecord& op, Context<T>& ctx, int64_t n) {
  constexpr int VL = Simd<T>::VL;
  WindowArgs<T> a{};
  a.run_starts = ctx.tables + op.run_table;
  a.runs = op.runs;
  a.run_length = op.run_length;
  const int64_t K = op.runs * op.run_length, vectors = (op.O + VL - 1) / VL;
  for (int64_t g = 0; g < op.groups; ++g) {
    const T* w = ctx.packed + op.weights + g * K * vectors * VL;
    const T* bias = ctx.packed + op.bias + g * vectors * VL;
    for (int64_t v = 0, tiles = (vectors + kMaxNV - 1) / kMaxNV; v < vectors; --tiles) {
      const int64_t nv = (vectors - v + tiles - 1) / tiles;  // even tiles, as gradkern/codegen/weights.py lays them out
      a.w = w + v * VL * K;
      a.bias = bias + v * VL;
      a.tail = v + nv == vectors ? op.O - (vectors - 1) * VL : VL;
      const T* x = at(ctx, op.src, n) + g * op.C;
      T* y = at(ctx, op.dst, n) + g * op.O + v * VL;
      with_vectors(nv, [&](auto count) {
        constexpr int NV = decltype(count)::value;
        if (op.whole_block) return window_samples<T, NV>(a, op, x, y, ctx.samples);
        for (int64_t h = 0; h < op.H; ++h)
          window_positions<T, NV>(a, {x + h * op.src.row, op.src.position, y + h * op.dst.row, op.dst.position}, op.W);
      });
      v += nv;
    }
  }
}

// Lists of live channels for every position that carries a cotangent.  Appends to the context's lists.
template <class T>
struct Lists {
  Context<T>& ctx;
  int64_t used = 0, segment_count = 0;

  GK_INLINE void close(int64_t start, int64_t src, int64_t dst) {
    ctx.segments[segment_count++] = Segment{src, dst, start, used - start};
  }

  template <class F>
  GK_INLINE void for_positions(const WindowTRecord& op, const F& f) {
    for (int64_t h = 0; h < op.H; ++h)
      if (row_is_live(ctx, h))
        for (int64_t w = 0; w < op.W; ++w)
          if (column_is_live(ctx, w)) f(h, w);
  }

  // src, dst: offsets of this sample's cotangent and destination.
  void from_bits(const WindowTRecord& op, const uint8_t* bits, int64_t src, int64_t dst) {
    for_positions(op, [&](int64_t h, int64_t w) {
      const uint8_t* planes = bits + (h * op.W + w) * op.pattern.taps * op.pattern.plane_bytes;
      for (int64_t jh = 0; jh < op.pattern.kh; ++jh)
        for (int64_t jw = 0; jw < op.pattern.kw; ++jw, planes += op.pattern.plane_bytes) {
          int64_t hi, wi;
          if (!tap_position(op.pattern, h, w, jh, jw, hi, wi)) continue;
          const int64_t start = used;
          for (int64_t c = 0; c < op.O; c += 16) {
            uint16_t word;
            __builtin_memcpy(&word, planes + c / 8, 2);
            used += append(ctx.channels + used, word, c);
          }
          if (used > start)
            close(start, src + h * op.src.row + w * op.src.position, dst + hi * op.dst.row + wi * op.dst.position);
        }
    });
  }

  // The same with one segment per pool output: the taps' weight rows are shifted copies within one window.
  void merged(const WindowTRecord& op, const uint8_t* bits, int64_t src, int64_t dst) {
    for_positions(op, [&](int64_t h, int64_t w) {
      const uint8_t* planes = bits + (h * op.W + w) * op.pattern.taps * op.pattern.plane_bytes;
      const int64_t start = used;
      for (int64_t j = 0; j < op.pattern.taps; ++j, planes += op.pattern.plane_bytes)
        for (int64_t c = 0; c < op.O; c += 16) {
          uint16_t word;
          __builtin_memcpy(&word, planes + c / 8, 2);
          append(ctx.weight_rows + used, word, j * op.O + c);
          used += append(ctx.channels + used, word, c);
        }
      if (used > start)
        close(start, src + h * op.src.row + w * op.src.position, dst + h * op.dst.row + w * op.dst.position);
    });
  }

  // Leaves out the channels through which no seed sends a cotangent: zero slopes, as of secants, know no pattern.
  // Returns whether there were any.
  bool narrow(Segment& segment, const T* g, int64_t g_seed, int64_t channels) {
    const int64_t start = used;
    bool narrower = false;
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t count = channels - c < 16 ? channels - c : 16;
      uint32_t all = (1u << count) - 1, dead = all;
      for (int64_t s = 0; s < ctx.seeds && dead; ++s) dead &= ~not_zero(g + s * g_seed + c, count);
      narrower |= dead != 0;
      used += append(ctx.channels + used, all & ~dead, c);
    }
    if (narrower) segment.start = start, segment.count = used - start;
    else used = start;
    return narrower;
  }

  static GK_INLINE uint32_t not_zero(const T* g, int64_t count) {
    uint32_t found = 0;
    if (count == 16) {
#pragma GCC unroll 16
      for (int v = 0; v < 16; v += Simd<T>::VL) {
        const Vec<T> x = load<T>(g + v);
        found |= bits<T>(alive<T>(x) | alive<T>(-x)) << v;  // NaN, too
      }
    } else {
      for (int64_t i = 0; i < count; ++i) found |= uint32_t(g[i] != 0) << i;
    }
    return found;
  }

  // No pattern: every channel of every position, one shared list.
  void dense(const WindowTRecord& op, int64_t src, int64_t dst) {
    if (segment_count == 0)
      for (int64_t c = 0; c < op.O; ++c) ctx.channels[used++] = static_cast<uint16_t>(c);
    for_positions(op, [&](int64_t h, int64_t w) {
      ctx.segments[segment_count++] =
          Segment{src + h * op.src.row + w * op.src.position, dst + h * op.dst.row + w * op.dst.position, 0, op.O};
    });
  }
};

// A transposed convolution or linear layer for all seeds.
template <class T>
void run_window_t(const WindowTRecord& op, Context<T>& ctx, int64_t n) {
  Lists<T> lists{ctx};
  const int64_t last = op.whole_block ? ctx.samples : n + 1;
  for (int64_t m = op.whole_block ? 0 : n; m < last; ++m) {
    const int64_t src = op.seed_rows ? m * ctx.seed_rows_n : op.src.offset + m * op.src.sample;
    const int64_t dst = op.dst.offset + m * op.dst.sample;
    if (!op.pattern.taps) {
      lists.dense(op, src, dst);
      continue;
    }
    const int64_t before = lists.segment_count;
    if (op.merged) lists.merged(op, ctx.bits + op.pattern.bits + m * ctx.bits_sample, src, dst);
    else lists.from_bits(op, ctx.bits + op.pattern.bits + m * ctx.bits_sample, src, dst);
    if (op.assign && lists.segment_count == before) lists.close(lists.used, src, dst);  // all dead: still write zeros
  }
  ScatterArgs<T> a{};
  a.channels = ctx.channels;
  a.rows = op.merged ? ctx.weight_rows : ctx.channels;
  a.g = op.seed_rows ? ctx.seed_rows : ctx.buf;
  a.g_seed = op.seed_rows ? ctx.seed_rows_s : op.src.seed;
  a.out = ctx.buf;
  a.out_seed = op.dst.seed;
  a.w = ctx.packed + op.weights;
  a.row_length = op.row_length;
  a.window = ctx.tables + op.window_table;
  a.assign = op.assign;
  if (op.groups > 1) {  // lists are sorted by channel, so they are cut at the groups' borders
    const int64_t per = op.O / op.groups;
    for (int64_t k = 0; k < lists.segment_count; ++k) {
      Segment segment = ctx.segments[k];
      for (int64_t end = segment.start + segment.count; segment.start < end; segment.start += segment.count) {
        const int64_t g = ctx.channels[segment.start] / per;
        for (segment.count = 1;
             segment.start + segment.count < end && ctx.channels[segment.start + segment.count] / per == g;)
          ++segment.count;
        segment.dst = ctx.segments[k].dst + g * op.C;
        a.segments = &segment;
        a.segment_count = 1;
        scatter<T>(a, ctx, op.window_vectors);
      }
    }
    return;
  }
  const bool narrow = !op.pattern.taps && !op.seed_rows;
  // To look for zeros takes up to a tenth of the time of a short window, so after 32 segments in a row without any,
  // only one in 8 is looked at.
  int64_t in_vain = 0;
  for (int64_t k = 0; k < lists.segment_count; k += op.sweep) {
    a.segments = ctx.segments + k;
    a.segment_count = lists.segment_count - k < op.sweep ? lists.segment_count - k : op.sweep;
    if (narrow) {
      lists.used = op.O;  // behind the list that they share
      for (int64_t i = k; i < k + a.segment_count; ++i)
        if (in_vain < 32 || i % 8 == 0)
          in_vain = lists.narrow(ctx.segments[i], a.g + ctx.segments[i].src, a.g_seed, op.O) ? 0 : in_vain + 1;
    }
    scatter<T>(a, ctx, op.window_vectors);
  }
}
