// Records that move or scale numbers: loads, stores, seeds, patterns, elementwise functions, sums.
#pragma once
#include <cmath>

#include "tile.cuh"

namespace gradkern::cuda {

// ---- in and out of the chip ----------------------------------------------------------------------------------

// [C][H][W] of the caller → channels-last interior.
template <class T>
GK_RECORD void run_load(const Op& op, const Tile<T> t) {
  const int C = op.C, H = op.H, W = op.W, row = op.dst_row, px = op.dst_px, size = C * H * W;
  const T* x = t.args.inputs[op.ext] + t.sample(0) * size;
  const Divider samples(size);
  const Places places(H, W);
  for (int i = t.tid(); i < t.count * size; i += t.threads()) {
    const auto [m, e] = samples.parts(i);
    const Place p = places.of(e);
    t.at(op.dst, op.dst_n, m)[p.h * row + p.w * px + p.c] = fixed(x + i);
  }
}

template <class T>
GK_RECORD void run_store(const Op& op, const Tile<T> t) {
  const int C = op.C, H = op.H, W = op.W, row = op.src_row, px = op.src_px, size = C * H * W;
  T* y = t.args.outputs[op.ext] + t.sample(0) * size;
  const Divider samples(size);
  const Places places(H, W);
  for (int i = t.tid(); i < t.count * size; i += t.threads()) {
    const auto [m, e] = samples.parts(i);
    const Place p = places.of(e);
    y[i] = t.at(op.src, op.src_n, m)[p.h * row + p.w * px + p.c];
  }
}

// The cotangent of an input → the caller's [N][S][C][H][W], in 16-byte stores where that is aligned.
template <class T>
GK_RECORD void run_store_t(const Op& op, const Tile<T> t) {
  constexpr int kPiece = 16 / sizeof(T);
  const int C = op.C, H = op.H, W = op.W, row = op.src_row, px = op.src_px, stride = op.src_s, size = C * H * W;
  T* y = t.args.results[op.ext];
  const int piece = size % kPiece == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0 ? kPiece : 1;
  const int each = size / piece;
  const Divider copies(each), seeds(t.seeds);
  const Places places(H, W);
  for (int i = t.tid(); i < t.count * t.seeds * each; i += t.threads()) {
    const auto [ms, rest] = copies.parts(i);
    const auto [m, s] = seeds.parts(ms);
    const int e = rest * piece;
    const T* g = t.at(op.src, op.src_n, m) + s * stride;
    T* out = y + (t.sample(m) * t.args.seeds + t.s0 + s) * size + e;
    Place p = places.of(e);
    T found[kPiece];
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      if (k >= piece) break;
      found[k] = g[p.h * row + p.w * px + p.c];
      if (++p.w == W) {
        p.w = 0;
        if (++p.h == H) p.h = 0, ++p.c;
      }
    }
    if (piece == 1) {
      out[0] = found[0];
    } else if constexpr (sizeof(T) == 4) {
      store4(out, Four<T>{{found[0], found[1], found[2], found[3]}});
    } else {
      *reinterpret_cast<double2*>(out) = make_double2(found[0], found[1]);
    }
  }
}

// ---- seeds -----------------------------------------------------------------------------------------------------

// Forward storage (one copy) before its border is relied on, or a cotangent (a copy per seed) before its first use.
template <class T>
GK_RECORD void run_zero(const Op& op, const Tile<T> t) {
  const int stride = op.dst_s, quads = (static_cast<int>(op.size) + 3) / 4, copies = stride ? t.seeds : 1;
  const Divider pieces(quads), seeds(copies);
  for (int i = t.tid(); i < t.count * copies * quads; i += t.threads()) {
    const auto [ms, quad] = pieces.parts(i);
    const auto [m, s] = seeds.parts(ms);
    store4(t.at(op.dst, op.dst_n, m) + s * stride + quad * 4, Four<T>{});
  }
}

// The ReLUs of guided backpropagation and deconvolution: what goes on is not negative.
template <class T>
GK_RECORD void run_rectify(const Op& op, const Tile<T> t) {
  const int stride = op.dst_s, quads = (static_cast<int>(op.size) + 3) / 4;
  const Divider pieces(quads), seeds(t.seeds);
  for (int i = t.tid(); i < t.count * t.seeds * quads; i += t.threads()) {
    const auto [ms, quad] = pieces.parts(i);
    const auto [m, s] = seeds.parts(ms);
    T* const y = t.at(op.dst, op.dst_n, m) + s * stride + quad * 4;
    Four<T> g = load4(y);
#pragma unroll
    for (int k = 0; k < 4; ++k) g.v[k] = g.v[k] < T(0) ? T(0) : g.v[k];
    store4(y, g);
  }
}

// The rows of the last weight, copied where they are not consumed directly.
template <class T>
GK_RECORD void run_seed_rows(const Op& op, const Tile<T> t) {
  const int size = op.size, stride = op.dst_s;
  const Divider copies(size), seeds(t.seeds);
  for (int i = t.tid(); i < t.count * t.seeds * size; i += t.threads()) {
    const auto [ms, e] = copies.parts(i);
    const auto [m, s] = seeds.parts(ms);
    t.at(op.dst, op.dst_n, m)[s * stride + e] =
        fixed(t.args.seed_rows + t.sample(m) * t.args.seed_rows_n + (t.s0 + s) * t.args.seed_rows_s + e);
  }
}

template <class T>
GK_RECORD void run_seed_onehot(const Op& op, const Tile<T> t) {
  const Places places(op.H, op.W);
  for (int i = t.tid(); i < t.count * t.seeds; i += t.threads()) {
    const int m = i / t.seeds, s = i - m * t.seeds;
    const Place p = places.of(static_cast<int>(fixed(t.args.targets + t.sample(m) * t.args.target_n + t.s0 + s)));
    t.at(op.dst, op.dst_n, m)[s * static_cast<int>(op.dst_s) + p.h * static_cast<int>(op.dst_row) +
                              p.w * static_cast<int>(op.dst_px) + p.c] = T(1);
  }
}

template <class T>
GK_RECORD void run_seed_dense(const Op& op, const Tile<T> t) {
  const int C = op.C, H = op.H, W = op.W, row = op.dst_row, px = op.dst_px, stride = op.dst_s, size = C * H * W;
  const Places places(H, W);
  const Divider copies(size), seeds(t.seeds);
  for (int i = t.tid(); i < t.count * t.seeds * size; i += t.threads()) {
    const auto [ms, e] = copies.parts(i);
    const auto [m, s] = seeds.parts(ms);
    const Place p = places.of(e);
    t.at(op.dst, op.dst_n, m)[s * stride + p.h * row + p.w * px + p.c] +=
        fixed(t.args.cotangents[op.ext] + (t.sample(m) * t.args.seeds + t.s0 + s) * size + e);
  }
}

// ---- patterns --------------------------------------------------------------------------------------------------

// ReLU, max pool, or both, as bits: plane j of output q holds the channels whose maximum is alive and came from
// tap j.  Half a warp takes 16 channels of one output.
template <class T>
GK_RECORD void run_pattern_words(const Op& op, const Tile<T> t) {
  const int H = op.H, W = op.W, C = op.C, kw = op.kw, taps = op.taps, nb = op.nb, relu = op.relu;
  const int src_row = op.src_row, src_px = op.src_px, words = nb / 2, each = H * W * words, total = t.count * each;
  const int half = t.lane() / 16, place = t.lane() % 16;
  for (int base = t.warp() * 2; base < total; base += t.warps() * 2) {  // the same number of rounds for all lanes
    const int item = base + half;
    const bool live = item < total;
    const int m = live ? item / each : 0, rest = live ? item - m * each : 0, q = rest / words, word = rest - q * words;
    const int c = word * 16 + place, h = q / W, w = q - h * W;
    const T* src = t.at(op.src, op.src_n, m);
    const bool on = live && c < C;
    int best = -1;
    T top = -T(INFINITY);  // of no position at all
    if (on)
      for (int j = 0; j < taps; ++j) {
        int hi, wi;
        if (!tap_position(op, h, w, j / kw, j % kw, hi, wi)) continue;
        const T x = src[hi * src_row + wi * src_px + c];
        if (best < 0 || x > top || x != x) best = j, top = x;  // the first maximum wins, but the last NaN
      }
    const bool alive = on && best >= 0 && (!relu || !(top <= T(0)));
    if (on) {
      T* y = t.at(op.dst, op.dst_n, m) + h * static_cast<int>(op.dst_row) + w * static_cast<int>(op.dst_px) + c;
      *y = !relu || alive ? top : T(0);
    }
    uint8_t* planes = const_cast<uint8_t*>(t.planes(op, m)) + q * taps * nb + word * 2;
    for (int j = 0; j < taps; ++j) {
      const uint32_t vote = __ballot_sync(0xffffffffu, alive && best == j);
      if (live && place == 0)
        *reinterpret_cast<uint16_t*>(planes + j * nb) = static_cast<uint16_t>(vote >> (16 * half));
    }
  }
}

// Four channels of one output: a lane's part of `run_pattern_quads`.
template <class T>
struct Winners {
  Four<T> top{{-T(INFINITY), -T(INFINITY), -T(INFINITY), -T(INFINITY)}};  // of no position at all
  int tap[4] = {-1, -1, -1, -1};

  GK_DEVICE void meet(const Four<T>& x, int j) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (tap[k] < 0 || x.v[k] > top.v[k] || x.v[k] != x.v[k]) tap[k] = j, top.v[k] = x.v[k];
  }
  // What is not alive is zero from here on, and has no tap.
  GK_DEVICE void rectify() {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (top.v[k] <= T(0)) tap[k] = -1, top.v[k] = T(0);
  }
  GK_DEVICE uint32_t won(int j) const {
    uint32_t nibble = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) nibble |= static_cast<uint32_t>(tap[k] == j) << k;
    return nibble;
  }
};

// The same, a lane for four channels; two neighbours make a byte of every plane.
template <class T>
GK_RECORD void run_pattern_quads(const Op& op, const Tile<T> t) {
  const int H = op.H, W = op.W, C = op.C, kw = op.kw, taps = op.taps, nb = op.nb, groups = 2 * nb;
  const int src_row = op.src_row, src_px = op.src_px, each = H * W * groups, total = t.count * each;
  const Divider samples(each), positions(groups), rows(W), columns(kw);
  for (int base = t.warp() * kWarp; base < total; base += t.warps() * kWarp) {
    const int item = base + t.lane();
    const bool live = item < total;
    const auto [m, rest] = samples.parts(live ? item : 0);
    const auto [q, quad] = positions.parts(rest);
    const auto [h, w] = rows.parts(q);
    const int c = quad * 4;
    Winners<T> winners;
    if (live && c < C) {
      const T* src = t.at(op.src, op.src_n, m) + c;
      for (int j = 0; j < taps; ++j) {
        int hi, wi;
        const auto [jh, jw] = columns.parts(j);
        if (tap_position(op, h, w, jh, jw, hi, wi)) winners.meet(load4(src + hi * src_row + wi * src_px), j);
      }
      if (op.relu) winners.rectify();
      store4(t.at(op.dst, op.dst_n, m) + h * static_cast<int>(op.dst_row) + w * static_cast<int>(op.dst_px) + c,
             winners.top);
    }
    uint8_t* planes = const_cast<uint8_t*>(t.planes(op, m)) + q * taps * nb + c / 8;
    for (int j = 0; j < taps; ++j) {
      const uint32_t nibble = winners.won(j), next = __shfl_xor_sync(0xffffffffu, nibble, 1);
      if (live && !(t.lane() & 1)) planes[j * nb] = static_cast<uint8_t>(nibble | next << 4);
    }
  }
}

template <class T>
GK_RECORD void run_pattern(const Op& op, const Tile<T> t) {
  const int64_t places = op.C | op.src | op.src_n | op.src_row | op.src_px | op.dst | op.dst_n | op.dst_row | op.dst_px;
  places & 3 ? run_pattern_words(op, t) : run_pattern_quads(op, t);
}

// A pattern applied to a dense destination: what was routed moves, the rest stays as it is.  Where windows overlap,
// one thread walks all positions of its channel, so that no two add to one number.
template <class T>
GK_RECORD void run_expand(const Op& op, const Tile<T> t) {
  const int H = op.H, W = op.W, C = op.C, kh = op.kh, kw = op.kw, taps = op.taps, nb = op.nb;
  const bool apart = op.sh > (kh - 1) * op.dh && op.sw > (kw - 1) * op.dw;
  const int walk = apart ? 1 : H * W, each = H * W / walk * C;
  const Divider pieces(each), seeds(t.seeds), channels(C), rows(W), columns(kw);
  for (int i = t.tid(); i < t.count * t.seeds * each; i += t.threads()) {
    const auto [ms, e] = pieces.parts(i);
    const auto [m, s] = seeds.parts(ms);
    const auto [first, c] = channels.parts(e);
    const T* g = t.at(op.src, op.src_n, m) + s * static_cast<int>(op.src_s) + c;
    T* y = t.at(op.dst, op.dst_n, m) + s * static_cast<int>(op.dst_s) + c;
    for (int q = first * walk, end = q + walk; q < end; ++q) {
      const uint8_t* planes = t.planes(op, m) + q * taps * nb + c / 8;
      const auto [h, w] = rows.parts(q);
      for (int j = 0; j < taps; ++j) {
        int hi, wi;
        if (!(planes[j * nb] >> (c % 8) & 1)) continue;
        const auto [jh, jw] = columns.parts(j);
        if (!tap_position(op, h, w, jh, jw, hi, wi)) continue;
        y[hi * static_cast<int>(op.dst_row) + wi * static_cast<int>(op.dst_px)] +=
            g[h * static_cast<int>(op.src_row) + w * static_cast<int>(op.src_px)];
      }
    }
  }
}

// ---- elementwise -----------------------------------------------------------------------------------------------

GK_DEVICE double as_double(int64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T, Fn F>
GK_DEVICE void scale_all(const Op& op, const Tile<T>& t) {
  const T p0 = static_cast<T>(as_double(op.p0)), p1 = static_cast<T>(as_double(op.p1)),
          p2 = static_cast<T>(as_double(op.p2));
  const int width = op.W * op.C, each = op.H * width;
  const Divider samples(each), rows(width);
  for (int i = t.tid(); i < t.count * each; i += t.threads()) {
    const auto [m, e] = samples.parts(i);
    const auto [h, r] = rows.parts(e);
    const Pair<T> found = Function<F>::at(t.at(op.src, op.src_n, m)[h * static_cast<int>(op.src_row) + r], p0, p1, p2);
    t.at(op.dst, op.dst_n, m)[h * static_cast<int>(op.dst_row) + r] = found.y;
    t.at(op.aux, op.aux_n, m)[h * static_cast<int>(op.aux_row) + r] = found.d;
  }
}

template <class T>
GK_RECORD void run_scale(const Op& op, const Tile<T> t) {
  switch (static_cast<Fn>(op.fn)) {
#define X(name) \
  case Fn::name: return scale_all<T, Fn::name>(op, t);
    GRADKERN_FUNCTIONS(X)
#undef X
  }
}

template <class T>
GK_RECORD void run_sum(const Op& op, const Tile<T> t) {
  const int width = op.W * op.C, each = op.H * width;
  const Divider samples(each), rows(width);
  for (int i = t.tid(); i < t.count * each; i += t.threads()) {
    const auto [m, e] = samples.parts(i);
    const auto [h, r] = rows.parts(e);
    t.at(op.dst, op.dst_n, m)[h * static_cast<int>(op.dst_row) + r] =
        t.at(op.src, op.src_n, m)[h * static_cast<int>(op.src_row) + r] +
        t.at(op.aux, op.aux_n, m)[h * static_cast<int>(op.aux_row) + r];
  }
}

// dst (+)= src · slope, or dst += src where there is no slope.
template <class T, bool Slope>
GK_RECORD void run_add(const Op& op, const Tile<T> t) {
  const int width = op.W * op.C, each = op.H * width;
  const Divider copies(each), seeds(t.seeds), rows(width);
  for (int i = t.tid(); i < t.count * t.seeds * each; i += t.threads()) {
    const auto [ms, e] = copies.parts(i);
    const auto [m, s] = seeds.parts(ms);
    const auto [h, r] = rows.parts(e);
    T g = t.at(op.src, op.src_n, m)[s * static_cast<int>(op.src_s) + h * static_cast<int>(op.src_row) + r];
    if constexpr (Slope) g *= t.at(op.aux, op.aux_n, m)[h * static_cast<int>(op.aux_row) + r];
    T* y = t.at(op.dst, op.dst_n, m) + s * static_cast<int>(op.dst_s) + h * static_cast<int>(op.dst_row) + r;
    *y = Slope && op.assign ? g : *y + g;
  }
}

}  // namespace gradkern::cuda
