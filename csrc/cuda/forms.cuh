// Records of the forms that are no window and no pattern: copies, stencils, products, norms.
#pragma once
#include <cmath>

#include "elementwise.cuh"

namespace gradkern::cuda {

// ---- copies: runs (source offset, destination offset, count, source step, destination step) --------------------

// No number is written twice.  All threads take one run after the other; where there are many, as in a transpose, every
// warp takes runs of its own.
template <class T>
GK_RECORD void run_move(const Op& op, const Tile<T> t) {
  const int size = op.size;
  const bool apart = size >= t.warps();
  const int first = apart ? t.lane() : t.tid(), step = apart ? kWarp : t.threads();
  for (int k = apart ? t.warp() : 0; k < size; k += apart ? t.warps() : 1) {
    const int32_t* run = t.args.tables + op.table + 5 * k;
    const int from = fixed(run), to = fixed(run + 1), count = fixed(run + 2), dx = fixed(run + 3), dy = fixed(run + 4);
    for (int i = first; i < t.count * count; i += step) {
      const int m = i / count, e = i - m * count;
      t.at(op.dst, op.dst_n, m)[to + e * dy] = t.at(op.src, op.src_n, m)[from + e * dx];
    }
  }
}

// A warp for a sample, a seed and a run where no number was read twice (fn 1).  Otherwise several runs, or one run
// several times, may add to a number: a warp for a sample and a seed, one run after the other.
template <class T>
GK_RECORD void run_move_t(const Op& op, const Tile<T> t) {
  const int parts = op.fn ? op.size : 1, each = op.fn ? 1 : op.size;
  for (int i = t.warp(); i < t.count * t.seeds * parts; i += t.warps()) {
    const int ms = i / parts, m = ms / t.seeds, s = ms - m * t.seeds, begin = i - ms * parts;
    const T* g = t.at(op.src, op.src_n, m) + s * static_cast<int>(op.src_s);
    T* y = t.at(op.dst, op.dst_n, m) + s * static_cast<int>(op.dst_s);
    for (int k = begin; k < begin + each; ++k) {
      const int32_t* run = t.args.tables + op.table + 5 * k;
      const int to = fixed(run), from = fixed(run + 1), count = fixed(run + 2), dy = fixed(run + 3),
                dg = fixed(run + 4);
      const int step = dy ? kWarp : 1;
      if (dy || t.lane() == 0)
        for (int e = dy ? t.lane() : 0; e < count; e += step) y[to + e * dy] += g[from + e * dg];
      __syncwarp();
    }
  }
}

// ---- stencils: y[q][c] (+)= Σ_e x[q][e][c] · w[row_e][c] -----------------------------------------------------
// Blocks of alike positions: (read offset, place, count, read step, place step, first entry, entries); an entry is
// (offset from the position's read offset, weight row).  Every number has one thread, forward and backward.

template <class T, bool Forward>
GK_RECORD void run_stencil(const Op& op, const Tile<T> t) {
  const int C = op.C, ldw = op.ldw, copies = Forward ? 1 : t.seeds;
  const T* weights = t.args.packed + op.wf;
  for (int k = 0; k < static_cast<int>(op.size); ++k) {
    const int32_t* block = t.args.tables + op.table + 7 * k;
    const int from = fixed(block), to = fixed(block + 1), count = fixed(block + 2), dx = fixed(block + 3),
              dy = fixed(block + 4), entries = fixed(block + 6);
    const int32_t* entry = t.args.tables + op.table2 + 2 * fixed(block + 5);
    for (int i = t.tid(); i < t.count * copies * count * C; i += t.threads()) {
      const int ms = i / (count * C), rest = i - ms * (count * C), q = rest / C, c = rest - q * C;
      const int m = ms / copies, s = ms - m * copies;
      const T* x = t.at(op.src, op.src_n, m) + s * static_cast<int>(op.src_s) + from + q * dx + c;
      T* y = t.at(op.dst, op.dst_n, m) + s * static_cast<int>(op.dst_s) + to + q * dy + c;
      T sum = Forward ? fixed(t.args.packed + op.bias + c) : *y;
      for (int e = 0; e < entries; ++e)
        sum += x[fixed(entry + 2 * e)] * fixed(weights + fixed(entry + 2 * e + 1) * ldw + c);
      *y = sum;
    }
  }
}

// ---- products of two values; a step of 0 stretches an axis ---------------------------------------------------

template <class T>
GK_RECORD void run_times(const Op& op, const Tile<T> t) {
  const int H = op.H, W = op.W, C = op.C, each = H * W * C, ca = op.kh, cb = op.kw;
  for (int i = t.tid(); i < t.count * each; i += t.threads()) {
    const int m = i / each, r = i - m * each, q = r / C, c = r - q * C, h = q / W, w = q - h * W;
    const T a = t.at(op.src, op.src_n, m)[h * static_cast<int>(op.src_row) + w * static_cast<int>(op.src_px) + c * ca];
    const T b = t.at(op.aux, op.aux_n, m)[h * static_cast<int>(op.aux_row) + w * static_cast<int>(op.aux_px) + c * cb];
    t.at(op.dst, op.dst_n, m)[h * static_cast<int>(op.dst_row) + w * static_cast<int>(op.dst_px) + c] = a * b;
  }
}

// dst += g · other, summed where dst was stretched: a thread for every number of dst.
template <class T>
GK_RECORD void run_times_t(const Op& op, const Tile<T> t) {
  const int H = op.H, W = op.W, C = op.C, row = op.dst_row, px = op.dst_px, cd = op.kh, cb = op.kw;
  const int rows = row ? H : 1, columns = px ? W : 1, channels = cd ? C : 1, each = rows * columns * channels;
  for (int i = t.tid(); i < t.count * t.seeds * each; i += t.threads()) {
    const int ms = i / each, r = i - ms * each, m = ms / t.seeds, s = ms - m * t.seeds;
    const int h0 = r / (columns * channels), w0 = r / channels % columns, c0 = r % channels;
    const T* g = t.at(op.src, op.src_n, m) + s * static_cast<int>(op.src_s);
    const T* b = t.at(op.aux, op.aux_n, m);
    T sum = 0;
    for (int h = row ? h0 : 0; h < (row ? h0 + 1 : H); ++h)
      for (int w = px ? w0 : 0; w < (px ? w0 + 1 : W); ++w)
        for (int c = cd ? c0 : 0; c < (cd ? c0 + 1 : C); ++c)
          sum += g[h * static_cast<int>(op.src_row) + w * static_cast<int>(op.src_px) + c] *
                 b[h * static_cast<int>(op.aux_row) + w * static_cast<int>(op.aux_px) + c * cb];
    t.at(op.dst, op.dst_n, m)[s * static_cast<int>(op.dst_s) + h0 * row + w0 * px + c0] += sum;
  }
}

// ---- softmax, log-softmax and normalisation along one axis of the storage: a thread per line -----------------
// taps: 0 channels, 1 columns, 2 rows.  fn: 0 softmax, 1 log-softmax, 2 normalise.  aux keeps the probabilities, or
// the normalised numbers and, `entries` behind them, every line's inverse deviation.

struct Line {
  int h, w, c;  // its first element
};
GK_DEVICE int lines_of(const Op& op) {
  return static_cast<int>(op.taps == 0 ? op.H * op.W : op.taps == 1 ? op.H * op.C : op.W * op.C);
}
GK_DEVICE Line line_of(const Op& op, int line) {
  const int W = op.W, C = op.C;
  if (op.taps == 0) return {line / W, line % W, 0};
  return op.taps == 1 ? Line{line / C, 0, line % C} : Line{0, line / C, line % C};
}
GK_DEVICE int line_step(const Op& op, int64_t row) {
  return static_cast<int>(op.taps == 0 ? 1 : op.taps == 1 ? op.C : row);
}

template <class T>
GK_RECORD void run_lines(const Op& op, const Tile<T> t) {
  const int len = op.taps == 0 ? op.C : op.taps == 1 ? op.W : op.H, lines = lines_of(op), C = op.C;
  const int dx = line_step(op, op.src_row), dy = line_step(op, op.dst_row), dp = line_step(op, op.aux_row);
  for (int i = t.tid(); i < t.count * lines; i += t.threads()) {
    const int m = i / lines, line = i - m * lines;
    const Line at = line_of(op, line);
    const T* x = t.at(op.src, op.src_n, m) + at.h * static_cast<int>(op.src_row) + at.w * C + at.c;
    T* y = t.at(op.dst, op.dst_n, m) + at.h * static_cast<int>(op.dst_row) + at.w * C + at.c;
    T* stored = t.at(op.aux, op.aux_n, m);
    T* p = stored + at.h * static_cast<int>(op.aux_row) + at.w * C + at.c;
    if (op.fn == 2) {
      T mean = 0, square = 0;
      for (int k = 0; k < len; ++k) mean += x[k * dx];
      mean /= static_cast<T>(len);
      for (int k = 0; k < len; ++k) square += (x[k * dx] - mean) * (x[k * dx] - mean);
      const T inverse = T(1) / std::sqrt(square / static_cast<T>(len) + static_cast<T>(as_double(op.p0)));
      stored[op.entries + line] = inverse;
      for (int k = 0; k < len; ++k) y[k * dy] = p[k * dp] = (x[k * dx] - mean) * inverse;
      continue;
    }
    T top = x[0], sum = 0;
    for (int k = 1; k < len; ++k) top = x[k * dx] > top || x[k * dx] != x[k * dx] ? x[k * dx] : top;
    for (int k = 0; k < len; ++k) sum += p[k * dp] = std::exp(x[k * dx] - top);
    const T log_sum = std::log(sum);
    for (int k = 0; k < len; ++k) {
      const T shifted = x[k * dx] - top;
      p[k * dp] /= sum;
      y[k * dy] = op.fn ? shifted - log_sum : p[k * dp];
    }
  }
}

// softmax: p ⊙ (g - ⟨g, p⟩);  log-softmax: g - p Σ g;  normalise: r (g - mean g - p mean(g p)).
template <class T>
GK_RECORD void run_lines_t(const Op& op, const Tile<T> t) {
  const int len = op.taps == 0 ? op.C : op.taps == 1 ? op.W : op.H, lines = lines_of(op), C = op.C;
  const int dg = line_step(op, op.src_row), dy = line_step(op, op.dst_row), dp = line_step(op, op.aux_row);
  for (int i = t.tid(); i < t.count * t.seeds * lines; i += t.threads()) {
    const int ms = i / lines, line = i - ms * lines, m = ms / t.seeds, s = ms - m * t.seeds;
    const Line at = line_of(op, line);
    const T* g = t.at(op.src, op.src_n, m) + s * static_cast<int>(op.src_s) + at.h * static_cast<int>(op.src_row) +
                 at.w * C + at.c;
    T* y = t.at(op.dst, op.dst_n, m) + s * static_cast<int>(op.dst_s) + at.h * static_cast<int>(op.dst_row) + at.w * C +
           at.c;
    const T* stored = t.at(op.aux, op.aux_n, m);
    const T* p = stored + at.h * static_cast<int>(op.aux_row) + at.w * C + at.c;
    T sum = 0, dot = 0;
    for (int k = 0; k < len; ++k) {
      sum += g[k * dg];
      dot += g[k * dg] * p[k * dp];
    }
    for (int k = 0; k < len; ++k) {
      const T gk = g[k * dg], pk = p[k * dp];
      if (op.fn == 2) y[k * dy] += stored[op.entries + line] * (gk - (sum + pk * dot) / static_cast<T>(len));
      else y[k * dy] += op.fn ? gk - pk * sum : pk * (gk - dot);
    }
  }
}

}  // namespace gradkern::cuda
