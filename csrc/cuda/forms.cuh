// Records of the other forms: zeroes, elementwise functions, sums, copies, stencils, products, norms.
#pragma once
#include <cmath>

#include "../elementwise.h"
#include "device.cuh"

namespace gradkern::cuda {

// ---- storage ---------------------------------------------------------------------------------------------------

// Zeroes forward storage (one copy) before its border is read, or a cotangent (a copy per seed) before its first use.
template <class T>
GK_RECORD void run(const ZeroRecord& op, const Tile<T> t) {
  over_copies(t, op.dst.seed ? t.seeds : 1, (static_cast<int>(op.elements) + 3) / 4,
              [&](int m, int s, int quad) { store4(t.at(op.dst, m, s) + quad * 4, Four<T>{}); });
}

// The ReLUs of guided backpropagation and deconvolution, which pass no negative cotangents.
template <class T>
GK_RECORD void run(const RectifyRecord& op, const Tile<T> t) {
  over_copies(t, t.seeds, static_cast<int>(op.elements), [&](int m, int s, int e) {
    T& g = t.at(op.dst, m, s)[e];
    g = g < T(0) ? T(0) : g;
  });
}

// ---- elementwise -----------------------------------------------------------------------------------------------

template <class T, Fn F>
GK_DEVICE void elementwise(const ElementwiseRecord& op, const Tile<T>& t) {
  const T p0 = static_cast<T>(op.p0), p1 = static_cast<T>(op.p1), p2 = static_cast<T>(op.p2);
  over_rows(op.extent, t, 1, [&](int m, int s, int h, int r) {
    const ValueAndDerivative<T> pair = Function<F>::at(t.at(op.src, m, s, h)[r], p0, p1, p2);
    t.at(op.dst, m, s, h)[r] = pair.y;
    t.at(op.slope, m, s, h)[r] = pair.d;
  });
}

template <class T>
GK_RECORD void run(const ElementwiseRecord& op, const Tile<T> t) {
  switch (static_cast<Fn>(op.function)) {
#define X(name) \
  case Fn::name: return elementwise<T, Fn::name>(op, t);
    GRADKERN_FUNCTIONS(X)
#undef X
  }
}

template <class T>
GK_RECORD void run(const ElementwiseTRecord& op, const Tile<T> t) {
  over_rows(op.extent, t, t.seeds, [&](int m, int s, int h, int r) {
    const T g = t.at(op.src, m, s, h)[r] * t.at(op.slope, m, 0, h)[r];
    T& y = t.at(op.dst, m, s, h)[r];
    y = op.assign ? g : y + g;
  });
}

template <class T>
GK_RECORD void run(const AddRecord& op, const Tile<T> t) {
  over_rows(op.extent, t, 1, [&](int m, int s, int h, int r) {
    t.at(op.dst, m, s, h)[r] = t.at(op.left, m, s, h)[r] + t.at(op.right, m, s, h)[r];
  });
}

template <class T>
GK_RECORD void run(const AccumulateRecord& op, const Tile<T> t) {
  over_rows(op.extent, t, t.seeds,
            [&](int m, int s, int h, int r) { t.at(op.dst, m, s, h)[r] += t.at(op.src, m, s, h)[r]; });
}

// ---- copies: runs (source offset, destination offset, count, source step, destination step) --------------------

struct Run {
  int from, to, count, from_step, to_step;

  template <class T>
  GK_DEVICE Run(const Tile<T>& t, int64_t table, int number) {
    const int32_t* run = t.args.tables + table + 5 * number;
    from = fixed(run), to = fixed(run + 1), count = fixed(run + 2);
    from_step = fixed(run + 3), to_step = fixed(run + 4);
  }
};

// No number is written twice, so that each sample and run has a warp.
template <class T>
GK_RECORD void run(const MoveRecord& op, const Tile<T> t) {
  const int runs = op.runs;
  for (int i = t.warp(); i < t.count * runs; i += t.warps()) {
    const int m = i / runs;
    const Run run(t, op.run_table, i - m * runs);
    for (int e = t.lane(); e < run.count; e += kWarp)
      t.at(op.dst, m)[run.to + e * run.to_step] = t.at(op.src, m)[run.from + e * run.from_step];
  }
}

// If no number was read twice, each sample, seed and run has a warp.  Otherwise several runs, or one run several times,
// may add to a number, so each sample and seed has a warp that processes one run after the other.
template <class T>
GK_RECORD void run(const MoveTRecord& op, const Tile<T> t) {
  const int parts = op.distinct ? op.runs : 1, each = op.distinct ? 1 : op.runs;
  for (int i = t.warp(); i < t.count * t.seeds * parts; i += t.warps()) {
    const int ms = i / parts, m = ms / t.seeds, s = ms - m * t.seeds, begin = i - ms * parts;
    const T* g = t.at(op.src, m, s);
    T* y = t.at(op.dst, m, s);
    for (int k = begin; k < begin + each; ++k) {
      const Run run(t, op.run_table, k);
      const bool sums = run.from_step == 0;  // one number was read for all of the run
      for (int e = sums ? 0 : t.lane(); e < (sums && t.lane() ? 0 : run.count); e += sums ? 1 : kWarp)
        y[run.from + e * run.from_step] += g[run.to + e * run.to_step];
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
  const Divider channels(C);
  for (int k = 0; k < static_cast<int>(table.blocks); ++k) {
    const int32_t* block = t.args.tables + table.block_table + 7 * k;
    const int from = fixed(block), to = fixed(block + 1), count = fixed(block + 2), dx = fixed(block + 3),
              dy = fixed(block + 4), entries = fixed(block + 6);
    const int32_t* entry = t.args.tables + table.entry_table + 2 * fixed(block + 5);
    over_copies(t, copies, count * C, [&](int m, int s, int i) {
      const auto [q, c] = channels.parts(i);
      const T* x = t.at(src, m, s) + from + q * dx + c;
      T* y = t.at(dst, m, s) + to + q * dy + c;
      T sum = bias ? fixed(bias + c) : *y;
      for (int e = 0; e < entries; ++e)
        sum += x[fixed(entry + 2 * e)] * fixed(weights + fixed(entry + 2 * e + 1) * row_length + c);
      *y = sum;
    });
  }
}

template <class T>
GK_RECORD void run(const StencilRecord& op, const Tile<T> t) {
  stencil(op.stencil, op.src, op.dst, static_cast<int>(op.C), t.args.packed + op.bias, 1, t);
}

template <class T>
GK_RECORD void run(const StencilTRecord& op, const Tile<T> t) {
  stencil<T>(op.stencil, op.src, op.dst, static_cast<int>(op.C), nullptr, t.seeds, t);
}

// ---- products of two values; a stride of 0 broadcasts an axis ------------------------------------------------

template <class T>
GK_RECORD void run(const MultiplyRecord& op, const Tile<T> t) {
  const Divider channels(op.extent.C);
  const int left = op.left_channel, right = op.right_channel;
  over_rows(op.extent, t, 1, [&](int m, int s, int h, int r) {
    const auto [w, c] = channels.parts(r);
    t.at(op.dst, m, s, h, w)[c] = t.at(op.left, m, s, h, w)[c * left] * t.at(op.right, m, s, h, w)[c * right];
  });
}

// dst += g · other, summed where dst was broadcast, with a thread for every number of dst.
template <class T>
GK_RECORD void run(const MultiplyTRecord& op, const Tile<T> t) {
  const Extent& all = op.extent;
  const Extent own{op.dst_channel ? all.C : 1, op.dst.row ? all.H : 1, op.dst.position ? all.W : 1};
  const int high = all.H / own.H, wide = all.W / own.W, deep = all.C / own.C, other = op.other_channel;
  const Divider channels(own.C);
  over_rows(own, t, t.seeds, [&](int m, int s, int h0, int r) {
    const auto [w0, c0] = channels.parts(r);
    T sum = 0;
    for (int h = h0; h < h0 + high; ++h)
      for (int w = w0; w < w0 + wide; ++w)
        for (int c = c0; c < c0 + deep; ++c) sum += t.at(op.src, m, s, h, w)[c] * t.at(op.other, m, 0, h, w)[c * other];
    t.at(op.dst, m, s, h0, w0)[c0] += sum;
  });
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
GK_RECORD void run(const LinesRecord& op, const Tile<T> t) {
  const LineSet& set = op.lines;
  const Lines lines(set);
  const int length = lines.length, dx = lines.step(op.src), dy = lines.step(op.dst), dp = lines.step(set.saved);
  over_copies(t, 1, lines.count, [&](int m, int s, int line) {
    const T* x = t.at(op.src, m, s) + lines.start(op.src, line);
    T* y = t.at(op.dst, m, s) + lines.start(op.dst, line);
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
      return;
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
  });
}

// softmax: p ⊙ (g - ⟨g, p⟩);  log-softmax: g - p Σ g;  normalize: r (g - mean g - p mean(g p)).
template <class T>
GK_RECORD void run(const LinesTRecord& op, const Tile<T> t) {
  const LineSet& set = op.lines;
  const Lines lines(set);
  const int length = lines.length, dg = lines.step(op.src), dy = lines.step(op.dst), dp = lines.step(set.saved);
  over_copies(t, t.seeds, lines.count, [&](int m, int s, int line) {
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
  });
}

}  // namespace gradkern::cuda
