// ReLU, max pool, or both, as bits: plane j of an output holds the channels whose maximum is alive and came from tap j.
#pragma once
#include <cmath>

#include "device.cuh"

namespace gradkern::cuda {

// A lane's four channels of one output: the maxima so far, and the taps that they came from.
template <class T>
struct Winners {
  Four<T> top{{-T(INFINITY), -T(INFINITY), -T(INFINITY), -T(INFINITY)}};  // of no position at all
  int tap[4] = {-1, -1, -1, -1};

  GK_DEVICE void meet(const Four<T>& x, int j) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (tap[k] < 0 || x.v[k] > top.v[k] || x.v[k] != x.v[k])
        tap[k] = j, top.v[k] = x.v[k];  // the first maximum wins, but the last NaN
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

// Writes the bits of the channels in `real`; an even lane `writes` those of its neighbour, too, if they are `joined` in
// a byte. All lanes must call this together.
template <class T>
GK_DEVICE void store_bits(const Winners<T>& winners, uint8_t* planes, int plane_bytes, int taps, uint32_t real,
                          bool writes, bool joined) {
#pragma unroll 1
  for (int j = 0; j < taps; ++j) {
    const uint32_t nibble = winners.won(j) & real, next = __shfl_xor_sync(0xffffffffu, nibble, 1);
    if (writes) planes[j * plane_bytes] = static_cast<uint8_t>(joined ? nibble | next << 4 : nibble);
  }
}

// The first `count` of four bits.
GK_DEVICE uint32_t first_bits(int count) { return count <= 0 ? 0u : count < 4 ? (1u << count) - 1 : 15u; }

// A lane takes four channels of one output.
template <class T>
GK_RECORD void run(const PatternRecord& op, const Tile<T> t) {
  const PatternRef& pattern = op.pattern;
  const int H = op.extent.H, W = op.extent.W, C = op.extent.C, kw = pattern.kw, taps = pattern.taps;
  const int plane_bytes = pattern.plane_bytes, quads = 2 * plane_bytes, each = H * W * quads, total = t.count * each;
  const bool together = C % 4 == 0 && by_fours(op.src) && by_fours(op.dst);
  const Steps from(op.src);
  const Divider samples(each), positions(quads), rows(W), columns(kw);
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
        if (tap_position(pattern, h, w, jh, jw, hi, wi))
          winners.meet(load_some(src + from(hi, wi), C - c, together), j);
      }
      if (op.relu) winners.rectify();
      store_some(t.at(op.dst, m, 0, h, w) + c, winners.top, C - c, together);
    }
    store_bits(winners, t.bits(pattern, m) + q * taps * plane_bytes + c / 8, plane_bytes, taps,
               live ? first_bits(C - c) : 0u, live && !(t.lane() & 1), true);
  }
}

// Adds a cotangent to the places that the bits select.  If windows overlap, one thread walks all positions of its
// channel, so that no two threads add to the same number.
template <class T>
GK_RECORD void run(const PatternTRecord& op, const Tile<T> t) {
  const PatternRef& pattern = op.pattern;
  const int H = op.extent.H, W = op.extent.W, C = op.extent.C, kh = pattern.kh, kw = pattern.kw;
  const int taps = pattern.taps, plane_bytes = pattern.plane_bytes;
  const bool apart = pattern.sh > (kh - 1) * pattern.dh && pattern.sw > (kw - 1) * pattern.dw;
  const int walk = apart ? 1 : H * W, each = H * W / walk * C;
  const Divider channels(C), rows(W), columns(kw);
  over_copies(t, t.seeds, each, [&](int m, int s, int e) {
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
  });
}

}  // namespace gradkern::cuda
