// Records of the other forms: zeroes, elementwise functions, sums, copies, stencils, products, norms.
#pragma once
#include <cmath>

#include "../elementwise.h"
#include "device.cuh"

namespace gradkern::cuda {

// ---- storage ---------------------------------------------------------------------------------------------------

// Zeroes forward storage (one copy) before its border is read, or a cotangent (a copy per seed) before its first use.
template <class T>
GK_RECORD void run_zero(const ZeroRecord& op, const Tile<T> t) {
  const int seed = op.dst.seed, quads = (static_cast<int>(op.elements) + 3) / 4, copies = seed ? t.seeds : 1;
  const Divider pieces(quads), seeds(copies);
  for (int i = t.tid(); i < t.count * copies * quads; i += t.threads()) {
    const auto [ms, quad] = pieces.parts(i);
    const auto [m, s] = seeds.parts(ms);
    store4(t.at(op.dst, m) + s * seed + quad * 4, Four<T>{});
  }
}

// The ReLUs of guided backpropagation and deconvolution, which pass no negative cotangents.
template <class T>
GK_RECORD void run_rectify(const RectifyRecord& op, const Tile<T> t) {
  const int seed = op.dst.seed, quads = (static_cast<int>(op.elements) + 3) / 4;
  const Divider pieces(quads), seeds(t.seeds);
  for (int i = t.tid(); i < t.count * t.seeds * quads; i += t.threads()) {
    const auto [ms, quad] = pieces.parts(i);
    const auto [m, s] = seeds.parts(ms);
    T* const y = t.at(op.dst, m) + s * seed + quad * 4;
    Four<T> g = load4(y);
#pragma unroll
    for (int k = 0; k < 4; ++k) g.v[k] = g.v[k] < T(0) ? T(0) : g.v[k];
    store4(y, g);
  }
}

// ---- elementwise -----------------------------------------------------------------------------------------------

template <class T, Fn F>
GK_DEVICE void elementwise_all(const ElementwiseRecord& op, const Tile<T>& t) {
  const T p0 = static_cast<T>(op.p0), p1 = static_cast<T>(op.p1), p2 = static_cast<T>(op.p2);
  const int width = op.extent.W * op.extent.C, each = op.extent.H * width;
  const Divider samples(each), rows(width);
  for (int i = t.tid(); i < t.count * each; i += t.threads()) {
    const auto [m, e] = samples.parts(i);
    const auto [h, r] = rows.parts(e);
    const ValueAndDerivative<T> pair = Function<F>::at(t.at(op.src, m)[Steps(op.src)(h, 0) + r], p0, p1, p2);
    t.at(op.dst, m)[Steps(op.dst)(h, 0) + r] = pair.y;
    t.at(op.slope, m)[Steps(op.slope)(h, 0) + r] = pair.d;
  }
}

template <class T>
GK_RECORD void run_elementwise(const ElementwiseRecord& op, const Tile<T> t) {
  switch (static_cast<Fn>(op.function)) {
#define X(name) \
  case Fn::name: return elementwise_all<T, Fn::name>(op, t);
    GRADKERN_FUNCTIONS(X)
#undef X
  }
}

template <class T>
GK_RECORD void run_add(const AddRecord& op, const Tile<T> t) {
  const int width = op.extent.W * op.extent.C, each = op.extent.H * width;
  const Divider samples(each), rows(width);
  for (int i = t.tid(); i < t.count * each; i += t.threads()) {
    const auto [m, e] = samples.parts(i);
    const auto [h, r] = rows.parts(e);
    t.at(op.dst, m)[Steps(op.dst)(h, 0) + r] =
        t.at(op.left, m)[Steps(op.left)(h, 0) + r] + t.at(op.right, m)[Steps(op.right)(h, 0) + r];
  }
}

// `each(m, s, h, r)`: number r of row h of the cotangent of seed s.
template <class T, class Each>
GK_DEVICE void over_cotangents(const Extent& extent, const Tile<T>& t, const Each& each) {
  const int width = extent.W * extent.C, size = extent.H * width;
  const Divider copies(size), seeds(t.seeds), rows(width);
  for (int i = t.tid(); i < t.count * t.seeds * size; i += t.threads()) {
    const auto [ms, e] = copies.parts(i);
    const auto [m, s] = seeds.parts(ms);
    const auto [h, r] = rows.parts(e);
    each(m, s, h, r);
  }
}

template <class T>
GK_RECORD void run_elementwise_t(const ElementwiseTRecord& op, const Tile<T> t) {
  over_cotangents(op.extent, t, [&](int m, int s, int h, int r) {
    const T g = t.at(op.src, m, s)[Steps(op.src)(h, 0) + r] * t.at(op.slope, m)[Steps(op.slope)(h, 0) + r];
    T* y = t.at(op.dst, m, s) + Steps(op.dst)(h, 0) + r;
    *y = op.assign ? g : *y + g;
  });
}

template <class T>
GK_RECORD void run_accumulate(const AccumulateRecord& op, const Tile<T> t) {
  over_cotangents(op.extent, t, [&](int m, int s, int h, int r) {
    t.at(op.dst, m, s)[Steps(op.dst)(h, 0) + r] += t.at(op.src, m, s)[Steps(op.src)(h, 0) + r];
  });
}

// ---- copies: runs (source offset, destination offset, count, source step, destination step) --------------------

// No number is written twice.  All threads process one run after the other; if there are many, as in a transpose, every
// warp processes its own runs.
template <class T>
GK_RECORD void run_move(const MoveRecord& op, const Tile<T> t) {
  const int runs = op.runs;
  const bool apart = runs >= t.warps();
  const int first = apart ? t.lane() : t.tid(), step = apart ? kWarp : t.threads();
  for (int k = apart ? t.warp() : 0; k < runs; k += apart ? t.warps() : 1) {
    const int32_t* run = t.args.tables + op.run_table + 5 * k;
    const int from = fixed(run), to = fixed(run + 1), count = fixed(run + 2), dx = fixed(run + 3), dy = fixed(run + 4);
    for (int i = first; i < t.count * count; i += step) {
      const int m = i / count, e = i - m * count;
      t.at(op.dst, m)[to + e * dy] = t.at(op.src, m)[from + e * dx];
    }
  }
}

// If no number was read twice, each sample, seed and run has a warp.  Otherwise several runs, or one run several times,
// may add to a number, so each sample and seed has a warp that processes one run after the other.
template <class T>
GK_RECORD void run_move_t(const MoveTRecord& op, const Tile<T> t) {
  const int parts = op.distinct ? op.runs : 1, each = op.distinct ? 1 : op.runs;
  for (int i = t.warp(); i < t.count * t.seeds * parts; i += t.warps()) {
    const int ms = i / parts, m = ms / t.seeds, s = ms - m * t.seeds, begin = i - ms * parts;
    const T* g = t.at(op.src, m, s);
    T* y = t.at(op.dst, m, s);
    for (int k = begin; k < begin + each; ++k) {
      const int32_t* run = t.args.tables + op.run_table + 5 * k;
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
// Blocks of positions with the same reads: (read offset, place, count, read step, place step, first entry, entries); an
// entry is (offset from the position's read offset, weight row).  Every number has one thread, forward and backward.

// `bias`: null in the backward pass, where the sum is added to the destination.
template <class T>
GK_DEVICE void stencil(const StencilTable& table, const Place& src, const Place& dst, int C, const T* bias, int copies,
                       const Tile<T>& t) {
  const int row_length = table.row_length;
  const T* weights = t.args.packed + table.weights;
  for (int k = 0; k < static_cast<int>(table.blocks); ++k) {
    const int32_t* block = t.args.tables + table.block_table + 7 * k;
    const int from = fixed(block), to = fixed(block + 1), count = fixed(block + 2), dx = fixed(block + 3),
              dy = fixed(block + 4), entries = fixed(block + 6);
    const int32_t* entry = t.args.tables + table.entry_table + 2 * fixed(block + 5);
    for (int i = t.tid(); i < t.count * copies * count * C; i += t.threads()) {
      const int ms = i / (count * C), rest = i - ms * (count * C), q = rest / C, c = rest - q * C;
      const int m = ms / copies, s = ms - m * copies;
      const T* x = t.at(src, m, s) + from + q * dx + c;
      T* y = t.at(dst, m, s) + to + q * dy + c;
      T sum = bias ? fixed(bias + c) : *y;
      for (int e = 0; e < entries; ++e)
        sum += x[fixed(entry + 2 * e)] * fixed(weights + fixed(entry + 2 * e + 1) * row_length + c);
      *y = sum;
    }
  }
}

template <class T>
GK_RECORD void run_stencil(const StencilRecord& op, const Tile<T> t) {
  stencil(op.stencil, op.src, op.dst, static_cast<int>(op.C), t.args.packed + op.bias, 1, t);
}

template <class T>
GK_RECORD void run_stencil_t(const StencilTRecord& op, const Tile<T> t) {
  stencil<T>(op.stencil, op.src, op.dst, static_cast<int>(op.C), nullptr, t.seeds, t);
}

// ---- products of two values; a stride of 0 broadcasts an axis ------------------------------------------------

template <class T>
GK_RECORD void run_multiply(const MultiplyRecord& op, const Tile<T> t) {
  const int H = op.extent.H, W = op.extent.W, C = op.extent.C, each = H * W * C;
  const int left = op.left_channel, right = op.right_channel;
  for (int i = t.tid(); i < t.count * each; i += t.threads()) {
    const int m = i / each, r = i - m * each, q = r / C, c = r - q * C, h = q / W, w = q - h * W;
    const T a = t.at(op.left, m)[Steps(op.left)(h, w) + c * left];
    const T b = t.at(op.right, m)[Steps(op.right)(h, w) + c * right];
    t.at(op.dst, m)[Steps(op.dst)(h, w) + c] = a * b;
  }
}

// dst += g · other, summed where dst was broadcast, with a thread for every number of dst.
template <class T>
GK_RECORD void run_multiply_t(const MultiplyTRecord& op, const Tile<T> t) {
  const int H = op.extent.H, W = op.extent.W, C = op.extent.C, row = op.dst.row, position = op.dst.position;
  const int channel = op.dst_channel, other = op.other_channel;
  const int rows = row ? H : 1, columns = position ? W : 1, channels = channel ? C : 1,
            each = rows * columns * channels;
  for (int i = t.tid(); i < t.count * t.seeds * each; i += t.threads()) {
    const int ms = i / each, r = i - ms * each, m = ms / t.seeds, s = ms - m * t.seeds;
    const int h0 = r / (columns * channels), w0 = r / channels % columns, c0 = r % channels;
    const T* g = t.at(op.src, m, s);
    const T* b = t.at(op.other, m);
    T sum = 0;
    for (int h = row ? h0 : 0; h < (row ? h0 + 1 : H); ++h)
      for (int w = position ? w0 : 0; w < (position ? w0 + 1 : W); ++w)
        for (int c = channel ? c0 : 0; c < (channel ? c0 + 1 : C); ++c)
          sum += g[Steps(op.src)(h, w) + c] * b[Steps(op.other)(h, w) + c * other];
    t.at(op.dst, m, s)[h0 * row + w0 * position + c0] += sum;
  }
}

// ---- softmax, log-softmax and normalization along one axis of the storage: a thread per line -----------------

struct Lines {
  int H, W, C, length, count;
  Along along;

  GK_DEVICE explicit Lines(const LineSet& lines)
      : H(static_cast<int>(lines.extent.H)),
        W(static_cast<int>(lines.extent.W)),
        C(static_cast<int>(lines.extent.C)),
        length(lines.along == Along::Channels  ? C
               : lines.along == Along::Columns ? W
                                               : H),
        count(H * W * C / length),
        along(lines.along) {}
  // The start of a line, and the stride from one number to the next.
  GK_DEVICE int start(const Place& place, int line) const {
    const int row = static_cast<int>(place.row);
    if (along == Along::Channels) return line / W * row + line % W * C;
    return along == Along::Columns ? line / C * row + line % C : line;
  }
  GK_DEVICE int step(const Place& place) const {
    return along == Along::Channels ? 1 : along == Along::Columns ? C : static_cast<int>(place.row);
  }
};

template <class T>
GK_RECORD void run_lines(const LinesRecord& op, const Tile<T> t) {
  const LineSet& set = op.lines;
  const Lines lines(set);
  const int length = lines.length, dx = lines.step(op.src), dy = lines.step(op.dst), dp = lines.step(set.saved);
  for (int i = t.tid(); i < t.count * lines.count; i += t.threads()) {
    const int m = i / lines.count, line = i - m * lines.count;
    const T* x = t.at(op.src, m) + lines.start(op.src, line);
    T* y = t.at(op.dst, m) + lines.start(op.dst, line);
    T* saved = t.at(set.saved, m);
    T* p = saved + lines.start(set.saved, line);
    if (set.function == LineFunction::Normalize) {
      T mean = 0, square = 0;
      for (int k = 0; k < length; ++k) mean += x[k * dx];
      mean /= static_cast<T>(length);
      for (int k = 0; k < length; ++k) square += (x[k * dx] - mean) * (x[k * dx] - mean);
      const T inverse = T(1) / std::sqrt(square / static_cast<T>(length) + static_cast<T>(set.epsilon));
      saved[set.deviations + line] = inverse;
      for (int k = 0; k < length; ++k) y[k * dy] = p[k * dp] = (x[k * dx] - mean) * inverse;
      continue;
    }
    T top = x[0], sum = 0;
    for (int k = 1; k < length; ++k) top = x[k * dx] > top || x[k * dx] != x[k * dx] ? x[k * dx] : top;
    for (int k = 0; k < length; ++k) sum += p[k * dp] = std::exp(x[k * dx] - top);
    const T log_sum = std::log(sum);
    for (int k = 0; k < length; ++k) {
      const T shifted = x[k * dx] - top;
      p[k * dp] /= sum;
      y[k * dy] = set.function == LineFunction::LogSoftmax ? shifted - log_sum : p[k * dp];
    }
  }
}

// softmax: p ⊙ (g - ⟨g, p⟩);  log-softmax: g - p Σ g;  normalize: r (g - mean g - p mean(g p)).
template <class T>
GK_RECORD void run_lines_t(const LinesTRecord& op, const Tile<T> t) {
  const LineSet& set = op.lines;
  const Lines lines(set);
  const int length = lines.length, dg = lines.step(op.src), dy = lines.step(op.dst), dp = lines.step(set.saved);
  for (int i = t.tid(); i < t.count * t.seeds * lines.count; i += t.threads()) {
    const int ms = i / lines.count, line = i - ms * lines.count, m = ms / t.seeds, s = ms - m * t.seeds;
    const T* g = t.at(op.src, m, s) + lines.start(op.src, line);
    T* y = t.at(op.dst, m, s) + lines.start(op.dst, line);
    const T* saved = t.at(set.saved, m);
    const T* p = saved + lines.start(set.saved, line);
    T sum = 0, dot = 0;
    for (int k = 0; k < length; ++k) {
      sum += g[k * dg];
      dot += g[k * dg] * p[k * dp];
    }
    for (int k = 0; k < length; ++k) {
      const T gk = g[k * dg], pk = p[k * dp];
      switch (set.function) {
        case LineFunction::Softmax: y[k * dy] += pk * (gk - dot); break;
        case LineFunction::LogSoftmax: y[k * dy] += gk - pk * sum; break;
        case LineFunction::Normalize:
          y[k * dy] += saved[set.deviations + line] * (gk - (sum + pk * dot) / static_cast<T>(length));
      }
    }
  }
}

}  // namespace gradkern::cuda
