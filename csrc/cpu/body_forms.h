// Records of the forms that are no window and no pattern: functions, sums, copies, stencils, products, norms.
// Included by body.h.

// ---- elementwise functions and sums --------------------------------------------------------------------------

template <class T, Fn F>
void scale_rows(const Op& op, const T* src, T* dst, T* slope) {
  const T p0 = static_cast<T>(__builtin_bit_cast(double, op.p0)),
          p1 = static_cast<T>(__builtin_bit_cast(double, op.p1)),
          p2 = static_cast<T>(__builtin_bit_cast(double, op.p2));
  for (int64_t h = 0; h < op.H; ++h) {
    const T* x = src + h * op.src_row;
    T *y = dst + h * op.dst_row, *d = slope + h * op.aux_row;
    const int64_t count = op.W * op.C;
#pragma GCC ivdep  // in place or apart, element i depends on element i alone
    for (int64_t i = 0; i < count; ++i) {
      const Pair<T> r = Function<F>::at(x[i], p0, p1, p2);
      y[i] = r.y;
      d[i] = r.d;
    }
  }
}

template <class T>
void run_scale(const Op& op, Context<T>& ctx, int64_t n) {
  T* slope = ctx.buf + op.aux + n * op.aux_n;
  switch (static_cast<Fn>(op.fn)) {
#define X(name) \
  case Fn::name: return scale_rows<T, Fn::name>(op, GK_SRC(n), GK_DST(n), slope);
    GRADKERN_FUNCTIONS(X)
#undef X
  }
}

// dst (+)= src · slope.  In place where the value has one reader.
template <class T>
void run_mul_d(const Op& op, Context<T>& ctx, int64_t n) {
  const T* d = ctx.buf + op.aux + n * op.aux_n;
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for (int64_t h = 0; h < op.H; ++h) {
      const T* g = GK_SRC(n) + s * op.src_s + h * op.src_row;
      T* y = GK_DST(n) + s * op.dst_s + h * op.dst_row;
      const T* dr = d + h * op.aux_row;
      if (op.assign)
        for (int64_t i = 0; i < op.W * op.C; ++i) y[i] = g[i] * dr[i];
      else
        for (int64_t i = 0; i < op.W * op.C; ++i) y[i] += g[i] * dr[i];
    }
}

template <class T>
void run_sum(const Op& op, Context<T>& ctx, int64_t n) {
  const T* b = ctx.buf + op.aux + n * op.aux_n;
  for (int64_t h = 0; h < op.H; ++h)
    for (int64_t i = 0; i < op.W * op.C; ++i)
      GK_DST(n)[h * op.dst_row + i] = GK_SRC(n)[h * op.src_row + i] + b[h * op.aux_row + i];
}

template <class T>
void run_add(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for (int64_t h = 0; h < op.H; ++h) {
      const T* g = GK_SRC(n) + s * op.src_s + h * op.src_row;
      T* y = GK_DST(n) + s * op.dst_s + h * op.dst_row;
      for (int64_t i = 0; i < op.W * op.C; ++i) y[i] += g[i];
    }
}

// ---- cotangents in place -------------------------------------------------------------------------------------

template <class T>
void run_zero(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s) __builtin_memset(GK_DST(n) + s * op.dst_s, 0, op.size * sizeof(T));
}

// A cotangent without its negative part.
template <class T>
void run_rectify(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    T* y = GK_DST(n) + s * op.dst_s;
    for (int64_t i = 0; i < op.size; ++i) y[i] = y[i] < T(0) ? T(0) : y[i];
  }
}

// ---- copies: runs (source offset, destination offset, count, source step, destination step) --------------------

template <class T>
void run_move(const Op& op, Context<T>& ctx, int64_t n) {
  const int32_t* run = ctx.tables + op.table;
  for (int64_t k = 0; k < op.size; ++k, run += 5) {
    const T* x = GK_SRC(n) + run[0];
    T* y = GK_DST(n) + run[1];
    const int64_t count = run[2], dx = run[3], dy = run[4];
    if (dx == 1 && dy == 1) __builtin_memcpy(y, x, count * sizeof(T));
    else
      for (int64_t i = 0; i < count; ++i) y[i * dy] = x[i * dx];
  }
}

template <class T>
void run_move_t(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    const int32_t* run = ctx.tables + op.table;
    for (int64_t k = 0; k < op.size; ++k, run += 5) {
      const T* g = GK_SRC(n) + s * op.src_s + run[1];
      T* y = GK_DST(n) + s * op.dst_s + run[0];
      const int64_t count = run[2], dy = run[3], dg = run[4];
      if (dy == 1 && dg == 1) {
#pragma GCC ivdep
        for (int64_t i = 0; i < count; ++i) y[i] += g[i];
      } else {
        for (int64_t i = 0; i < count; ++i) y[i * dy] += g[i * dg];
      }
    }
  }
}

// ---- stencils: y[q][c] (+)= Σ_e x[q][e][c] · w[row_e][c] -----------------------------------------------------
// Blocks of alike positions: (read offset, place, count, read step, place step, first entry, entries); an entry is
// (offset from the position's read offset, weight row).

template <class T, int PB>
GK_INLINE void stencil_tile(const T* x, int64_t dx, T* y, int64_t dy, const int32_t* entry, int64_t entries, const T* w,
                            int64_t ldw, const T* bias, int64_t left) {
  constexpr int VL = Simd<T>::VL;
  Vec<T> acc[PB];
#pragma GCC unroll 8
  for (int p = 0; p < PB; ++p) acc[p] = bias ? load<T>(bias) : load<T>(y + p * dy);
  for (int64_t e = 0; e < entries; ++e) {
    const Vec<T> we = load<T>(w + entry[2 * e + 1] * ldw);
    const T* xe = x + entry[2 * e];
#pragma GCC unroll 8
    for (int p = 0; p < PB; ++p) acc[p] += load<T>(xe + p * dx) * we;
  }
#pragma GCC unroll 8
  for (int p = 0; p < PB; ++p) left >= VL ? store<T>(y + p * dy, acc[p]) : store_n<T>(y + p * dy, acc[p], left);
}

// `bias` null: add to what is there.
template <class T>
void stencil(const Op& op, const Context<T>& ctx, const T* src, T* dst, const T* bias) {
  constexpr int VL = Simd<T>::VL;
  const int32_t* block = ctx.tables + op.table;
  const int32_t* table = ctx.tables + op.table2;
  const T* w = ctx.packed + op.wf;
  for (int64_t k = 0; k < op.size; ++k, block += 7) {
    const int64_t count = block[2], dx = block[3], dy = block[4];
    const int32_t* entry = table + 2 * block[5];
    for (int64_t c = 0; c < op.C; c += VL) {
      const T* x = src + block[0] + c;
      T* y = dst + block[1] + c;
      const T* b = bias ? bias + c : nullptr;
      int64_t q = 0;
      for (; q + 8 <= count; q += 8)
        stencil_tile<T, 8>(x + q * dx, dx, y + q * dy, dy, entry, block[6], w + c, op.ldw, b, op.C - c);
      for (; q + 2 <= count; q += 2)
        stencil_tile<T, 2>(x + q * dx, dx, y + q * dy, dy, entry, block[6], w + c, op.ldw, b, op.C - c);
      for (; q < count; ++q)
        stencil_tile<T, 1>(x + q * dx, dx, y + q * dy, dy, entry, block[6], w + c, op.ldw, b, op.C - c);
    }
  }
}

template <class T>
void run_stencil(const Op& op, Context<T>& ctx, int64_t n) {
  stencil<T>(op, ctx, GK_SRC(n), GK_DST(n), ctx.packed + op.bias);
}

template <class T>
void run_stencil_t(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    stencil<T>(op, ctx, GK_SRC(n) + s * op.src_s, GK_DST(n) + s * op.dst_s, static_cast<const T*>(nullptr));
}

// ---- products of two values; a step of 0 stretches an axis ---------------------------------------------------

template <class T>
void run_product(const Op& op, Context<T>& ctx, int64_t n) {
  const T* other = ctx.buf + op.aux + n * op.aux_n;
  for (int64_t h = 0; h < op.H; ++h)
    for (int64_t w = 0; w < op.W; ++w) {
      const T* a = GK_SRC(n) + h * op.src_row + w * op.src_px;
      const T* b = other + h * op.aux_row + w * op.aux_px;
      T* y = GK_DST(n) + h * op.dst_row + w * op.dst_px;
      for (int64_t c = 0; c < op.C; ++c) y[c] = a[c * op.kh] * b[c * op.kw];
    }
}

// dst += g · other, summed where dst was stretched.
template <class T>
void run_product_t(const Op& op, Context<T>& ctx, int64_t n) {
  const T* other = ctx.buf + op.aux + n * op.aux_n;
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for (int64_t h = 0; h < op.H; ++h)
      for (int64_t w = 0; w < op.W; ++w) {
        const T* g = GK_SRC(n) + s * op.src_s + h * op.src_row + w * op.src_px;
        const T* b = other + h * op.aux_row + w * op.aux_px;
        T* y = GK_DST(n) + s * op.dst_s + h * op.dst_row + w * op.dst_px;
        if (op.kh && op.kw) {
#pragma GCC ivdep
          for (int64_t c = 0; c < op.C; ++c) y[c] += g[c] * b[c];
        } else if (op.kh) {
          const T b0 = b[0];
#pragma GCC ivdep
          for (int64_t c = 0; c < op.C; ++c) y[c] += g[c] * b0;
        } else {
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < op.C; ++c) sum += g[c] * b[c * op.kw];
          y[0] += sum;
        }
      }
}

// ---- softmax, log-softmax and normalisation along one axis of the storage ------------------------------------
// taps: 0 channels, 1 columns, 2 rows.  fn: 0 softmax, 1 log-softmax, 2 normalise.  aux keeps the probabilities, or
// the normalised numbers and, `entries` behind them, every line's inverse deviation.

// Bundles of at most 64 parallel lines whose k-th elements are neighbours; f gets the bundle's offset for a given
// row step, the number of lines, and its first line.
template <class F>
GK_INLINE void for_bundles(const Op& op, const F& f) {
  if (op.taps == 0) {
    for (int64_t h = 0; h < op.H; ++h)
      for (int64_t w = 0; w < op.W; ++w) f(h, w, int64_t(0), int64_t(1), h * op.W + w);
    return;
  }
  const int64_t outer = op.taps == 1 ? op.H : op.W;
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t c = 0; c < op.C; c += 64)
      f(op.taps == 1 ? o : 0, op.taps == 1 ? 0 : o, c, op.C - c < 64 ? op.C - c : int64_t(64), o * op.C + c);
}
// Elements of a line and the step between them.
GK_INLINE int64_t line_length(const Op& op) { return op.taps == 0 ? op.C : (op.taps == 1 ? op.W : op.H); }
GK_INLINE int64_t line_step(const Op& op, int64_t row) { return op.taps == 0 ? 1 : (op.taps == 1 ? op.C : row); }

// One line whose elements are neighbours; returns its inverse deviation (normalise).
template <class T>
GK_INLINE T line_forward(const Op& op, int64_t len, const T* x, T* y, T* p) {
  if (op.fn == 2) {
    T mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t k = 0; k < len; ++k) mean += x[k];
    mean /= static_cast<T>(len);
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < len; ++k) square += (x[k] - mean) * (x[k] - mean);
    const T r = T(1) / std::sqrt(square / static_cast<T>(len) + static_cast<T>(__builtin_bit_cast(double, op.p0)));
#pragma GCC ivdep
    for (int64_t k = 0; k < len; ++k) y[k] = p[k] = (x[k] - mean) * r;
    return r;
  }
  T most = x[0], total = 0;
  for (int64_t k = 1; k < len; ++k) most = x[k] > most || x[k] != x[k] ? x[k] : most;
#pragma GCC ivdep
  for (int64_t k = 0; k < len; ++k) p[k] = power_of_e(x[k] - most);
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < len; ++k) total += p[k];
  const T log = op.fn ? std::log(total) : T(0);
#pragma GCC ivdep
  for (int64_t k = 0; k < len; ++k) {
    p[k] /= total;
    y[k] = op.fn ? x[k] - most - log : p[k];
  }
  return 0;
}

template <class T>
void run_lines(const Op& op, Context<T>& ctx, int64_t n) {
  const int64_t len = line_length(op), dx = line_step(op, op.src_row), dy = line_step(op, op.dst_row),
                dp = line_step(op, op.aux_row);
  T* const stored = ctx.buf + op.aux + n * op.aux_n;
  for_bundles(op, [&](int64_t h, int64_t w, int64_t c, int64_t lines, int64_t line) {
    const T* x = GK_SRC(n) + h * op.src_row + w * op.C + c;
    T* y = GK_DST(n) + h * op.dst_row + w * op.C + c;
    T* p = stored + h * op.aux_row + w * op.C + c;
    if (op.taps == 0) {
      const T r = line_forward<T>(op, len, x, y, p);
      if (op.fn == 2) stored[op.entries + line] = r;
      return;
    }
    T a[64] = {}, b[64] = {};
    if (op.fn == 2) {
      for (int64_t k = 0; k < len; ++k)
        for (int64_t i = 0; i < lines; ++i) a[i] += x[k * dx + i];
      for (int64_t i = 0; i < lines; ++i) a[i] /= static_cast<T>(len);
      for (int64_t k = 0; k < len; ++k)
        for (int64_t i = 0; i < lines; ++i) b[i] += (x[k * dx + i] - a[i]) * (x[k * dx + i] - a[i]);
      const T eps = static_cast<T>(__builtin_bit_cast(double, op.p0));
      for (int64_t i = 0; i < lines; ++i)
        stored[op.entries + line + i] = b[i] = T(1) / std::sqrt(b[i] / static_cast<T>(len) + eps);
      for (int64_t k = 0; k < len; ++k)
        for (int64_t i = 0; i < lines; ++i) y[k * dy + i] = p[k * dp + i] = (x[k * dx + i] - a[i]) * b[i];
      return;
    }
    for (int64_t i = 0; i < lines; ++i) a[i] = x[i];
    for (int64_t k = 1; k < len; ++k)
      for (int64_t i = 0; i < lines; ++i) {
        const T v = x[k * dx + i];
        a[i] = v > a[i] || v != v ? v : a[i];
      }
    for (int64_t k = 0; k < len; ++k)
      for (int64_t i = 0; i < lines; ++i) b[i] += p[k * dp + i] = power_of_e(x[k * dx + i] - a[i]);
    for (int64_t k = 0; k < len; ++k)
      for (int64_t i = 0; i < lines; ++i) {
        p[k * dp + i] /= b[i];
        y[k * dy + i] = op.fn ? x[k * dx + i] - a[i] - std::log(b[i]) : p[k * dp + i];
      }
  });
}

// One line of the cotangent.
template <class T>
GK_INLINE void line_backward(const Op& op, int64_t len, const T* g, T* y, const T* p, T r) {
  T sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t k = 0; k < len; ++k) {
    sum += g[k];
    dot += g[k] * p[k];
  }
  if (op.fn == 2) {
    sum /= static_cast<T>(len);
    dot /= static_cast<T>(len);
#pragma GCC ivdep
    for (int64_t k = 0; k < len; ++k) y[k] += r * (g[k] - sum - p[k] * dot);
  } else if (op.fn == 1) {
#pragma GCC ivdep
    for (int64_t k = 0; k < len; ++k) y[k] += g[k] - p[k] * sum;
  } else {
#pragma GCC ivdep
    for (int64_t k = 0; k < len; ++k) y[k] += p[k] * (g[k] - dot);
  }
}

// softmax: p ⊙ (g - ⟨g, p⟩);  log-softmax: g - p Σ g;  normalise: r (g - mean g - p mean(g p)).
template <class T>
void run_lines_t(const Op& op, Context<T>& ctx, int64_t n) {
  const int64_t len = line_length(op), dg = line_step(op, op.src_row), dy = line_step(op, op.dst_row),
                dp = line_step(op, op.aux_row);
  const T* const stored = ctx.buf + op.aux + n * op.aux_n;
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for_bundles(op, [&](int64_t h, int64_t w, int64_t c, int64_t lines, int64_t line) {
      const T* g = GK_SRC(n) + s * op.src_s + h * op.src_row + w * op.C + c;
      T* y = GK_DST(n) + s * op.dst_s + h * op.dst_row + w * op.C + c;
      const T* p = stored + h * op.aux_row + w * op.C + c;
      if (op.taps == 0) return line_backward<T>(op, len, g, y, p, op.fn == 2 ? stored[op.entries + line] : T(0));
      T sum[64] = {}, dot[64] = {};
      for (int64_t k = 0; k < len; ++k)
        for (int64_t i = 0; i < lines; ++i) {
          sum[i] += g[k * dg + i];
          dot[i] += g[k * dg + i] * p[k * dp + i];
        }
      for (int64_t k = 0; k < len; ++k)
        for (int64_t i = 0; i < lines; ++i) {
          const T gk = g[k * dg + i], pk = p[k * dp + i];
          if (op.fn == 2)
            y[k * dy + i] += stored[op.entries + line + i] * (gk - (sum[i] + pk * dot[i]) / static_cast<T>(len));
          else y[k * dy + i] += op.fn ? gk - pk * sum[i] : pk * (gk - dot[i]);
        }
    });
}
