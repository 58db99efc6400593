// ReLU, max pool, or both, as bits: plane j of an output holds the channels whose maximum is alive and came from tap j.
#pragma once
#include <cmath>

#include "device.cuh"

namespace gradkern::cuda {

// Half a warp takes 16 channels of one output.
template <class T>
GK_RECORD void run_pattern_words(const PatternRecord& op, const Tile<T> t) {
  const PatternRef& pattern = op.pattern;
  const int H = op.extent.H, W = op.extent.W, C = op.extent.C, kw = pattern.kw, taps = pattern.taps;
  const int plane_bytes = pattern.plane_bytes, relu = op.relu;
  const int words = plane_bytes / 2, each = H * W * words, total = t.count * each;
  const int half = t.lane() / 16, place = t.lane() % 16;
  const Steps from(op.src);
  for (int base = t.warp() * 2; base < total; base += t.warps() * 2) {  // the same number of rounds for all lanes
    const int item = base + half;
    const bool live = item < total;
    const int m = live ? item / each : 0, rest = live ? item - m * each : 0, q = rest / words, word = rest - q * words;
    const int c = word * 16 + place, h = q / W, w = q - h * W;
    const T* src = t.at(op.src, m);
    const bool on = live && c < C;
    int best = -1;
    T top = -T(INFINITY);  // of no position at all
    if (on)
      for (int j = 0; j < taps; ++j) {
        int hi, wi;
        if (!tap_position(pattern, h, w, j / kw, j % kw, hi, wi)) continue;
        const T x = src[from(hi, wi) + c];
        if (best < 0 || x > top || x != x) best = j, top = x;  // the first maximum wins, but the last NaN
      }
    const bool alive = on && best >= 0 && (!relu || !(top <= T(0)));
    if (on) t.at(op.dst, m)[Steps(op.dst)(h, w) + c] = !relu || alive ? top : T(0);
    uint8_t* planes = t.bits(pattern, m) + q * taps * plane_bytes + word * 2;
    for (int j = 0; j < taps; ++j) {
      const uint32_t vote = __ballot_sync(0xffffffffu, alive && best == j);
      if (live && place == 0)
        *reinterpret_cast<uint16_t*>(planes + j * plane_bytes) = static_cast<uint16_t>(vote >> (16 * half));
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
  // From here on, channels that are not alive are zero and have no tap.
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
GK_RECORD void run_pattern_quads(const PatternRecord& op, const Tile<T> t) {
  const PatternRef& pattern = op.pattern;
  const int H = op.extent.H, W = op.extent.W, C = op.extent.C, kw = pattern.kw, taps = pattern.taps;
  const int plane_bytes = pattern.plane_bytes, groups = 2 * plane_bytes;
  const int each = H * W * groups, total = t.count * each;
  const Steps from(op.src);
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
      const T* src = t.at(op.src, m) + c;
      for (int j = 0; j < taps; ++j) {
        int hi, wi;
        const auto [jh, jw] = columns.parts(j);
        if (tap_position(pattern, h, w, jh, jw, hi, wi)) winners.meet(load4(src + from(hi, wi)), j);
      }
      if (op.relu) winners.rectify();
      store4(t.at(op.dst, m) + Steps(op.dst)(h, w) + c, winners.top);
    }
    uint8_t* planes = t.bits(pattern, m) + q * taps * plane_bytes + c / 8;
    for (int j = 0; j < taps; ++j) {
      const uint32_t nibble = winners.won(j), next = __shfl_xor_sync(0xffffffffu, nibble, 1);
      if (live && !(t.lane() & 1)) planes[j * plane_bytes] = static_cast<uint8_t>(nibble | next << 4);
    }
  }
}

template <class T>
GK_RECORD void run_pattern(const PatternRecord& op, const Tile<T> t) {
  op.extent.C % 4 == 0 && by_fours(op.src) && by_fours(op.dst) ? run_pattern_quads(op, t) : run_pattern_words(op, t);
}

// Adds a cotangent to the places that the bits select.  If windows overlap, one thread walks all positions of its
// channel, so that no two threads add to the same number.
template <class T>
GK_RECORD void run_pattern_t(const PatternTRecord& op, const Tile<T> t) {
  const PatternRef& pattern = op.pattern;
  const int H = op.extent.H, W = op.extent.W, C = op.extent.C, kh = pattern.kh, kw = pattern.kw;
  const int taps = pattern.taps, plane_bytes = pattern.plane_bytes;
  const bool apart = pattern.sh > (kh - 1) * pattern.dh && pattern.sw > (kw - 1) * pattern.dw;
  const int walk = apart ? 1 : H * W, each = H * W / walk * C;
  const Divider pieces(each), seeds(t.seeds), channels(C), rows(W), columns(kw);
  for (int i = t.tid(); i < t.count * t.seeds * each; i += t.threads()) {
    const auto [ms, e] = pieces.parts(i);
    const auto [m, s] = seeds.parts(ms);
    const auto [first, c] = channels.parts(e);
    const T* g = t.at(op.src, m, s) + c;
    T* y = t.at(op.dst, m, s) + c;
    for (int q = first * walk, end = q + walk; q < end; ++q) {
      const uint8_t* planes = t.bits(pattern, m) + q * taps * plane_bytes + c / 8;
      const auto [h, w] = rows.parts(q);
      for (int j = 0; j < taps; ++j) {
        int hi, wi;
        if (!(planes[j * plane_bytes] >> (c % 8) & 1)) continue;
        const auto [jh, jw] = columns.parts(j);
        if (!tap_position(pattern, h, w, jh, jw, hi, wi)) continue;
        y[Steps(op.dst)(hi, wi)] += g[Steps(op.src)(h, w)];
      }
    }
  }
}

}  // namespace gradkern::cuda
