// A convolution with the ReLU or the pool after it: the result of the convolution stays in registers.
//
// The tiles are those of window.cuh, but a thread's positions are whole pools.
#pragma once
#include "pattern.cuh"
#include "window.cuh"

namespace gradkern::cuda {

// The bits of four channels, or of those that are `real`; the neighbour with the other four of a byte joins in. All
// lanes must call this together.
template <class T>
GK_DEVICE void store_bits(const Winners<T>& winners, uint8_t* planes, int plane_bytes, int taps, bool on, uint32_t real,
                          int channel_lane, int channel_lanes) {
#pragma unroll 1
  for (int j = 0; j < taps; ++j) {
    const uint32_t nibble = on ? winners.won(j) & real : 0u, next = __shfl_xor_sync(0xffffffffu, nibble, 1);
    if (on && !(channel_lane & 1))
      planes[j * plane_bytes] = static_cast<uint8_t>(channel_lanes > 1 ? nibble | next << 4 : nibble);
  }
}

template <class T, int Taps>
GK_DEVICE void window_pooled(const PooledWindowRecord& op, const Tile<T>& t) {
  constexpr int P = kPooled<T>, kPools = P / Taps;
  const int wide = op.W, pooled = static_cast<int>(op.H) * wide, positions = t.count * pooled * Taps;
  const int O = op.O, L = op.run_length, K = static_cast<int>(op.runs) * L, row_length = weight_row(O);
  const int kh = op.pattern.kh, kw = op.pattern.kw, plane_bytes = op.pattern.plane_bytes;
  const int position = op.src.position, row = op.src.row;
  const WindowShape s = window_shape<P>(positions, O, 1, K, t.warps(), 0);
  const int channel_lane = t.lane() % s.channel_lanes, position_lane = t.lane() / s.channel_lanes;
  const bool aligned = ((op.src.offset | op.src.sample | position | row | op.C) & 3) == 0;
  const bool joined = O % 4 == 0 && by_fours(op.dst);
  const Divider samples(pooled), rows(wide), columns(kw), across(s.across);
  for (int item = t.warp(); item < s.tiles; item += t.warps()) {
    const auto [along, part] = across.parts(item);
    const int o = part * (s.channel_lanes * 4) + channel_lane * 4,
              q0 = (along * s.position_lanes + position_lane) * kPools;
    const uint32_t real = o >= O ? 0u : O - o < 4 ? (1u << (O - o)) - 1 : 15u;
    int m[kPools], q[kPools], offset[P];
#pragma unroll
    for (int i = 0; i < kPools; ++i) {
      const auto [sample, place] = samples.parts(q0 + i < t.count * pooled ? q0 + i : 0);
      const auto [h, w] = rows.parts(place);
      m[i] = sample, q[i] = place;
#pragma unroll
      for (int j = 0; j < Taps; ++j) {
        const auto [jh, jw] = columns.parts(j);
        offset[i * Taps + j] =
            static_cast<int>(t.at(op.src, sample) - t.buf) + (h * kh + jh) * row + (w * kw + jw) * position;
      }
    }
    T acc[P][4] = {};
    window_sum(acc, t.buf, offset, aligned, t.args.tables + op.run_table, L,
               t.args.packed + op.weights + (o < O ? o : 0), row_length, 0, K);
    const Four<T> bias = fixed4(t.args.packed + op.bias + (o < O ? o : 0));
#pragma unroll
    for (int i = 0; i < kPools; ++i) {
      const bool on = o < O && q0 + i < t.count * pooled;
      Winners<T> winners;
#pragma unroll
      for (int j = 0; j < Taps; ++j) {
        Four<T> x;
#pragma unroll
        for (int k = 0; k < 4; ++k) x.v[k] = acc[i * Taps + j][k] + bias.v[k];
        winners.meet(x, j);
      }
      if (op.relu) winners.rectify();
      const auto [h, w] = rows.parts(q[i]);
      T* y = t.at(op.dst, m[i]) + Steps(op.dst)(h, w) + o;
      if (on && joined) store4(y, winners.top);
      if (on && !joined) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (o + k < O) y[k] = winners.top.v[k];
      }
      store_bits(winners, t.bits(op.pattern, m[i]) + q[i] * Taps * plane_bytes + o / 8, plane_bytes, Taps, on, real,
                 channel_lane, s.channel_lanes);
    }
  }
}

template <class T>
GK_RECORD void run_window_pooled(const PooledWindowRecord& op, const Tile<T> t) {
  const int64_t taps = op.pattern.taps;
  taps == 1 ? window_pooled<T, 1>(op, t) : taps == 2 ? window_pooled<T, 2>(op, t) : window_pooled<T, 4>(op, t);
}

}  // namespace gradkern::cuda
