// Records of the forms other than windows and patterns: functions, sums, copies, stencils, products, norms.
// Included by body.h.

// ---- elementwise functions and sums --------------------------------------------------------------------------

template <class T, Fn F>
void elementwise_rows(const ElementwiseRecord& op, const T* src, T* dst, T* slope) {
  const T p0 = static_cast<T>(op.p0), p1 = static_cast<T>(op.p1), p2 = static_cast<T>(op.p2);
  for (int64_t h = 0; h < op.extent.H; ++h) {
    const T* x = src + h * op.src.row;
    T *y = dst + h * op.dst.row, *d = slope + h * op.slope.row;
    const int64_t count = op.extent.W * op.extent.C;
#pragma GCC ivdep  // even in place, element i depends only on element i
    for (int64_t i = 0; i < count; ++i) {
      const ValueAndDerivative<T> r = Function<F>::at(x[i], p0, p1, p2);
      y[i] = r.y;
      d[i] = r.d;
    }
  }
}

template <class T>
void run_elementwise(const ElementwiseRecord& op, Context<T>& ctx, int64_t n) {
  T* slope = at(ctx, op.slope, n);
  switch (static_cast<Fn>(op.function)) {
#define X(name) \
  case Fn::name: return elementwise_rows<T, Fn::name>(op, at(ctx, op.src, n), at(ctx, op.dst, n), slope);
    GRADKERN_FUNCTIONS(X)
#undef X
  }
}

// dst (+)= src · slope.  In place if the value has one reader.
template <class T>
void run_elementwise_t(const ElementwiseTRecord& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for_spans(ctx, op.extent.H, op.extent.W * op.extent.C, [&](int64_t h, int64_t first, int64_t count) {
      const T* g = at(ctx, op.src, n) + s * op.src.seed + h * op.src.row + first;
      T* y = at(ctx, op.dst, n) + s * op.dst.seed + h * op.dst.row + first;
      const T* d = at(ctx, op.slope, n) + h * op.slope.row + first;
      if (op.assign)
        for (int64_t i = 0; i < count; ++i) y[i] = g[i] * d[i];
      else
        for (int64_t i = 0; i < count; ++i) y[i] += g[i] * d[i];
    });
}

template <class T>
void run_add(const AddRecord& op, Context<T>& ctx, int64_t n) {
  const T *a = at(ctx, op.left, n), *b = at(ctx, op.right, n);
  T* y = at(ctx, op.dst, n);
  for (int64_t h = 0; h < op.extent.H; ++h)
    for (int64_t i = 0; i < op.extent.W * op.extent.C; ++i)
      y[h * op.dst.row + i] = a[h * op.left.row + i] + b[h * op.right.row + i];
}

template <class T>
void run_accumulate(const AccumulateRecord& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for_spans(ctx, op.extent.H, op.extent.W * op.extent.C, [&](int64_t h, int64_t first, int64_t count) {
      const T* g = at(ctx, op.src, n) + s * op.src.seed + h * op.src.row + first;
      T* y = at(ctx, op.dst, n) + s * op.dst.seed + h * op.dst.row + first;
      for (int64_t i = 0; i < count; ++i) y[i] += g[i];
    });
}

// ---- cotangents in place -------------------------------------------------------------------------------------

template <class T>
void run_zero(const ZeroRecord& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for_spans(ctx, 1, op.elements, [&](int64_t, int64_t first, int64_t count) {
      __builtin_memset(at(ctx, op.dst, n) + s * op.dst.seed + first, 0, count * sizeof(T));
    });
}

// A cotangent without its negative part.
template <class T>
void run_rectify(const RectifyRecord& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for_spans(ctx, 1, op.elements, [&](int64_t, int64_t first, int64_t count) {
      T* y = at(ctx, op.dst, n) + s * op.dst.seed + first;
      for (int64_t i = 0; i < count; ++i) y[i] = y[i] < T(0) ? T(0) : y[i];
    });
}

// ---- copies: runs (source offset, destination offset, count, source step, destination step) --------------------

template <class T>
void run_move(const MoveRecord& op, Context<T>& ctx, int64_t n) {
  const int32_t* run = ctx.tables + op.run_table;
  for (int64_t k = 0; k < op.runs; ++k, run += 5) {
    const T* x = at(ctx, op.src, n) + run[0];
    T* y = at(ctx, op.dst, n) + run[1];
    const int64_t count = run[2], dx = run[3], dy = run[4];
    if (dx == 1 && dy == 1) __builtin_memmove(y, x, count * sizeof(T));
    else
      for (int64_t i = 0; i < count; ++i) y[i * dy] = x[i * dx];
  }
}

template <class T>
void run_move_t(const MoveTRecord& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    const int32_t* run = ctx.area ? ctx.area->items : ctx.tables + op.run_table;
    const int64_t runs = ctx.area ? ctx.area->count : op.runs;
    for (int64_t k = 0; k < runs; ++k, run += 5) {
      const T* g = at(ctx, op.src, n) + s * op.src.seed + run[1];
      T* y = at(ctx, op.dst, n) + s * op.dst.seed + run[0];
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
// Blocks of positions with the same reads: (read offset, place, count, read step, place step, first entry, entries); an
// entry is (offset from the position's read offset, weight row).

template <class T, int PB>
GK_INLINE void stencil_tile(const T* x, int64_t dx, T* y, int64_t dy, const int32_t* entry, int64_t entries, const T* w,
                            int64_t row_length, const T* bias, int64_t left) {
  constexpr int VL = Simd<T>::VL;
  Vec<T> acc[PB];
#pragma GCC unroll 8
  for (int p = 0; p < PB; ++p) acc[p] = bias ? load<T>(bias) : load<T>(y + p * dy);
  for (int64_t e = 0; e < entries; ++e) {
    const Vec<T> we = load<T>(w + entry[2 * e + 1] * row_length);
    const T* xe = x + entry[2 * e];
#pragma GCC unroll 8
    for (int p = 0; p < PB; ++p) acc[p] += load<T>(xe + p * dx) * we;
  }
#pragma GCC unroll 8
  for (int p = 0; p < PB; ++p) left >= VL ? store<T>(y + p * dy, acc[p]) : store_n<T>(y + p * dy, acc[p], left);
}

// If `bias` is null, the sum is added to the destination.
template <class T>
void stencil(const StencilTable& op, int64_t C, const Context<T>& ctx, const T* src, T* dst, const T* bias) {
  constexpr int VL = Simd<T>::VL;
  const int32_t* block = ctx.area ? ctx.area->items : ctx.tables + op.block_table;
  const int64_t blocks = ctx.area ? ctx.area->count : op.blocks;
  const int32_t* table = ctx.tables + op.entry_table;
  const T* w = ctx.packed + op.weights;
  for (int64_t k = 0; k < blocks; ++k, block += 7) {
    const int64_t count = block[2], dx = block[3], dy = block[4];
    const int32_t* entry = table + 2 * block[5];
    for (int64_t c = 0; c < C; c += VL) {
      const T* x = src + block[0] + c;
      T* y = dst + block[1] + c;
      const T* b = bias ? bias + c : nullptr;
      int64_t q = 0;
      for (; q + 8 <= count; q += 8)
        stencil_tile<T, 8>(x + q * dx, dx, y + q * dy, dy, entry, block[6], w + c, op.row_length, b, C - c);
      for (; q + 2 <= count; q += 2)
        stencil_tile<T, 2>(x + q * dx, dx, y + q * dy, dy, entry, block[6], w + c, op.row_length, b, C - c);
      for (; q < count; ++q)
        stencil_tile<T, 1>(x + q * dx, dx, y + q * dy, dy, entry, block[6], w + c, op.row_length, b, C - c);
    }
  }
}

template <class T>
void run_stencil(const StencilRecord& op, Context<T>& ctx, int64_t n) {
  stencil<T>(op.stencil, op.C, ctx, at(ctx, op.src, n), at(ctx, op.dst, n), ctx.packed + op.bias);
}

template <class T>
void run_stencil_t(const StencilTRecord& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    stencil<T>(op.stencil, op.C, ctx, at(ctx, op.src, n) + s * op.src.seed, at(ctx, op.dst, n) + s * op.dst.seed,
               static_cast<const T*>(nullptr));
}

// ---- products of two values; a stride of 0 broadcasts an axis ------------------------------------------------

template <class T>
void run_multiply(const MultiplyRecord& op, Context<T>& ctx, int64_t n) {
  const T* other = at(ctx, op.right, n);
  for (int64_t h = 0; h < op.extent.H; ++h)
    for (int64_t w = 0; w < op.extent.W; ++w) {
      const T* a = at(ctx, op.left, n) + h * op.left.row + w * op.left.position;
      const T* b = other + h * op.right.row + w * op.right.position;
      T* y = at(ctx, op.dst, n) + h * op.dst.row + w * op.dst.position;
      for (int64_t c = 0; c < op.extent.C; ++c) y[c] = a[c * op.left_channel] * b[c * op.right_channel];
    }
}

// dst += g · other, summed where dst was broadcast.
template <class T>
void run_multiply_t(const MultiplyTRecord& op, Context<T>& ctx, int64_t n) {
  const T* other = at(ctx, op.other, n);
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for (int64_t h = 0; h < op.extent.H; ++h)
      for (int64_t w = 0; w < op.extent.W; ++w) {
        if (!row_is_live(ctx, h) || !column_is_live(ctx, w)) continue;
        const T* g = at(ctx, op.src, n) + s * op.src.seed + h * op.src.row + w * op.src.position;
        const T* b = other + h * op.other.row + w * op.other.position;
        T* y = at(ctx, op.dst, n) + s * op.dst.seed + h * op.dst.row + w * op.dst.position;
        if (op.dst_channel && op.other_channel) {
#pragma GCC ivdep
          for (int64_t c = 0; c < op.extent.C; ++c) y[c] += g[c] * b[c];
        } else if (op.dst_channel) {
          const T b0 = b[0];
#pragma GCC ivdep
          for (int64_t c = 0; c < op.extent.C; ++c) y[c] += g[c] * b0;
        } else {
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < op.extent.C; ++c) sum += g[c] * b[c * op.other_channel];
          y[0] += sum;
        }
      }
}

// ---- softmax, log-softmax and normalization along one axis of the storage ------------------------------------
constexpr int64_t kBundle = 64;  // parallel lines that are computed together

// Calls f for bundles of lines whose k-th elements are neighbours, with the bundle's row, column and channel, the
// number of its lines, and its first line.
template <class F>
GK_INLINE void for_bundles(const LineSet& op, const F& f) {
  if (op.along == Along::Channels) {
    for (int64_t h = 0; h < op.extent.H; ++h)
      for (int64_t w = 0; w < op.extent.W; ++w) f(h, w, int64_t(0), int64_t(1), h * op.extent.W + w);
    return;
  }
  const int64_t outer = op.along == Along::Columns ? op.extent.H : op.extent.W;
  for (int64_t o = 0; o < outer; ++o)
    for (int64_t c = 0; c < op.extent.C; c += kBundle)
      f(op.along == Along::Columns ? o : 0, op.along == Along::Columns ? 0 : o, c,
        op.extent.C - c < kBundle ? op.extent.C - c : kBundle, o * op.extent.C + c);
}
// Elements of a line and the step between them.
GK_INLINE int64_t line_length(const LineSet& op) {
  return op.along == Along::Channels ? op.extent.C : (op.along == Along::Columns ? op.extent.W : op.extent.H);
}
GK_INLINE int64_t line_step(const LineSet& op, int64_t row) {
  return op.along == Along::Channels ? 1 : (op.along == Along::Columns ? op.extent.C : row);
}

// Adds up f(k, i) along each line in blocks.  The rounding error then grows with the length of a block and the number
// of blocks; one running sum would lose terms that are small beside it.
template <class T, class F>
GK_INLINE void sum_lines(int64_t len, int64_t lines, T* sum, const F& f) {
  constexpr int64_t kBlock = 32;
  for (int64_t begin = 0; begin < len; begin += kBlock) {
    const int64_t end = begin + kBlock < len ? begin + kBlock : len;
    T part[kBundle] = {};
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = 0; i < lines; ++i) part[i] += f(k, i);
    for (int64_t i = 0; i < lines; ++i) sum[i] += part[i];
  }
}

// One line of contiguous elements; returns its inverse deviation (normalize).
template <class T>
GK_INLINE T line_forward(const LineSet& op, int64_t len, const T* x, T* y, T* p) {
  if (op.function == LineFunction::Normalize) {
    T mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t k = 0; k < len; ++k) mean += x[k];
    mean /= static_cast<T>(len);
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < len; ++k) square += (x[k] - mean) * (x[k] - mean);
    const T inverse = T(1) / std::sqrt(square / static_cast<T>(len) + static_cast<T>(op.epsilon));
#pragma GCC ivdep
    for (int64_t k = 0; k < len; ++k) y[k] = p[k] = (x[k] - mean) * inverse;
    return inverse;
  }
  T most = x[0], total = 0;
  for (int64_t k = 1; k < len; ++k) most = x[k] > most || x[k] != x[k] ? x[k] : most;
#pragma GCC ivdep
  for (int64_t k = 0; k < len; ++k) p[k] = power_of_e(x[k] - most);
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < len; ++k) total += p[k];
  const T log = op.function == LineFunction::LogSoftmax ? std::log(total) : T(0);
#pragma GCC ivdep
  for (int64_t k = 0; k < len; ++k) {
    p[k] /= total;
    y[k] = op.function == LineFunction::LogSoftmax ? x[k] - most - log : p[k];
  }
  return 0;
}

template <class T>
void run_lines(const LinesRecord& op, Context<T>& ctx, int64_t n) {
  const int64_t len = line_length(op.lines), dx = line_step(op.lines, op.src.row), dy = line_step(op.lines, op.dst.row),
                dp = line_step(op.lines, op.lines.saved.row);
  T* const stored = at(ctx, op.lines.saved, n);
  for_bundles(op.lines, [&](int64_t h, int64_t w, int64_t c, int64_t lines, int64_t line) {
    const T* x = at(ctx, op.src, n) + h * op.src.row + w * op.lines.extent.C + c;
    T* y = at(ctx, op.dst, n) + h * op.dst.row + w * op.lines.extent.C + c;
    T* p = stored + h * op.lines.saved.row + w * op.lines.extent.C + c;
    if (op.lines.along == Along::Channels) {
      const T inverse = line_forward<T>(op.lines, len, x, y, p);
      if (op.lines.function == LineFunction::Normalize) stored[op.lines.deviations + line] = inverse;
      return;
    }
    if (op.lines.function == LineFunction::Normalize) {
      T mean[kBundle] = {}, inverse[kBundle] = {};  // sums of squares, then the inverse deviations
      sum_lines(len, lines, mean, [&](int64_t k, int64_t i) { return x[k * dx + i]; });
      for (int64_t i = 0; i < lines; ++i) mean[i] /= static_cast<T>(len);
      sum_lines(len, lines, inverse, [&](int64_t k, int64_t i) {
        const T centred = x[k * dx + i] - mean[i];
        return centred * centred;
      });
      const T eps = static_cast<T>(op.lines.epsilon);
      for (int64_t i = 0; i < lines; ++i)
        stored[op.lines.deviations + line + i] = inverse[i] = T(1) / std::sqrt(inverse[i] / static_cast<T>(len) + eps);
      for (int64_t k = 0; k < len; ++k)
        for (int64_t i = 0; i < lines; ++i) y[k * dy + i] = p[k * dp + i] = (x[k * dx + i] - mean[i]) * inverse[i];
      return;
    }
    T most[kBundle] = {}, total[kBundle] = {};
    for (int64_t i = 0; i < lines; ++i) most[i] = x[i];
    for (int64_t k = 1; k < len; ++k)
      for (int64_t i = 0; i < lines; ++i) {
        const T v = x[k * dx + i];
        most[i] = v > most[i] || v != v ? v : most[i];
      }
    sum_lines(len, lines, total,
              [&](int64_t k, int64_t i) { return p[k * dp + i] = power_of_e(x[k * dx + i] - most[i]); });
    for (int64_t k = 0; k < len; ++k)
      for (int64_t i = 0; i < lines; ++i) {
        p[k * dp + i] /= total[i];
        y[k * dy + i] = op.lines.function == LineFunction::LogSoftmax ? x[k * dx + i] - most[i] - std::log(total[i])
                                                                      : p[k * dp + i];
      }
  });
}

// One line of the cotangent.
template <class T>
GK_INLINE void line_backward(const LineSet& op, int64_t len, const T* g, T* y, const T* p, T inverse) {
  T sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t k = 0; k < len; ++k) {
    sum += g[k];
    dot += g[k] * p[k];
  }
  if (op.function == LineFunction::Normalize) {
    sum /= static_cast<T>(len);
    dot /= static_cast<T>(len);
#pragma GCC ivdep
    for (int64_t k = 0; k < len; ++k) y[k] += inverse * (g[k] - sum - p[k] * dot);
  } else if (op.function == LineFunction::LogSoftmax) {
#pragma GCC ivdep
    for (int64_t k = 0; k < len; ++k) y[k] += g[k] - p[k] * sum;
  } else {
#pragma GCC ivdep
    for (int64_t k = 0; k < len; ++k) y[k] += p[k] * (g[k] - dot);
  }
}

// softmax: p ⊙ (g - ⟨g, p⟩);  log-softmax: g - p Σ g;  normalize: r (g - mean g - p mean(g p)).
template <class T>
void run_lines_t(const LinesTRecord& op, Context<T>& ctx, int64_t n) {
  const int64_t len = line_length(op.lines), dg = line_step(op.lines, op.src.row), dy = line_step(op.lines, op.dst.row),
                dp = line_step(op.lines, op.lines.saved.row);
  const T* const stored = at(ctx, op.lines.saved, n);
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for_bundles(op.lines, [&](int64_t h, int64_t w, int64_t c, int64_t lines, int64_t line) {
      if (!row_is_live(ctx, h) || !column_is_live(ctx, w)) return;  // with an area, lines run along the channels
      const T* g = at(ctx, op.src, n) + s * op.src.seed + h * op.src.row + w * op.lines.extent.C + c;
      T* y = at(ctx, op.dst, n) + s * op.dst.seed + h * op.dst.row + w * op.lines.extent.C + c;
      const T* p = stored + h * op.lines.saved.row + w * op.lines.extent.C + c;
      if (op.lines.along == Along::Channels)
        return line_backward<T>(
            op.lines, len, g, y, p,
            op.lines.function == LineFunction::Normalize ? stored[op.lines.deviations + line] : T(0));
      T sum[kBundle] = {}, dot[kBundle] = {};
      if (op.lines.function != LineFunction::Softmax)
        sum_lines(len, lines, sum, [&](int64_t k, int64_t i) { return g[k * dg + i]; });
      if (op.lines.function != LineFunction::LogSoftmax)
        sum_lines(len, lines, dot, [&](int64_t k, int64_t i) { return g[k * dg + i] * p[k * dp + i]; });
      for (int64_t k = 0; k < len; ++k)
        for (int64_t i = 0; i < lines; ++i) {
          const T gk = g[k * dg + i], pk = p[k * dp + i];
          if (op.lines.function == LineFunction::Normalize)
            y[k * dy + i] +=
                stored[op.lines.deviations + line + i] * (gk - (sum[i] + pk * dot[i]) / static_cast<T>(len));
          else y[k * dy + i] += op.lines.function == LineFunction::LogSoftmax ? gk - pk * sum[i] : pk * (gk - dot[i]);
        }
    });
}
