// Forward contractions: convolutions, and linear layers over all samples of the tile.
//
// A warp computes `position_lanes·4` positions × `channel_lanes·4` channels, and a thread 4 × 4 of them.  A thread's
// positions are `position_lanes` apart, so that neighbours read neighbouring addresses; its channels are contiguous, so
// that a weight is one 16-byte load.  If there are fewer tiles than warps, the contraction is divided between warps and
// the parts are added in a fixed order.
#pragma once
#include "pattern.cuh"

namespace gradkern::cuda {

constexpr int kPositions = 4;  // of a thread; window_pooled has its own number

struct WindowShape {
  int channel_lanes, position_lanes;  // lanes along the channels and along the positions
  int across, along, tiles;           // tiles along the channels, along the positions, in all
  int split;                          // parts of the contraction

  // A lane's share of a tile: its group, its first channel, the tile's number along the positions, and the lane's.
  struct Share {
    int group, channel, tile, lane;
  };
  GK_DEVICE Share share(int item, int lane) const {
    const int group = item / (across * along), rest = item - group * (across * along), tile = rest / across;
    return {group, ((rest - tile * across) * channel_lanes + lane % channel_lanes) * 4, tile, lane / channel_lanes};
  }
};

template <int P>
GK_DEVICE WindowShape window_shape(int positions, int channels, int groups, int K, int warps, int room) {
  WindowShape s;
  s.channel_lanes = channels > 16 ? 8 : channels > 8 ? 4 : channels > 4 ? 2 : 1;
  s.position_lanes = kWarp / s.channel_lanes;
  s.across = (channels + s.channel_lanes * 4 - 1) / (s.channel_lanes * 4);
  s.along = (positions + s.position_lanes * P - 1) / (s.position_lanes * P);
  s.tiles = s.across * s.along * groups;
  s.split = warps / s.tiles;
  if (s.split > K / 16) s.split = K / 16;
  if (s.split > room / (s.tiles * kWarp * 16)) s.split = room / (s.tiles * kWarp * 16);
  if (s.split < 1) s.split = 1;
  return s;
}

// The length of a row of a weight with this many channels; gradkern/codegen/cuda/weights.py: DeviceWindow.
GK_DEVICE int weight_row(int channels) { return (channels + 3) / 4 * 4; }

// acc[p][o] += Σ_{k0 ≤ k < k1} x[offset[p] + run(k)] · w[k][o].
template <class T, int P>
GK_DEVICE void window_sum(T (&acc)[P][4], const T* buf, const int (&offset)[P], bool aligned, const int32_t* runs,
                          int L, const T* w, int row_length, int k0, int k1) {
  w += k0 * row_length;
  for (int r = k0 / L; r * L < k1; ++r) {
    const int run = fixed(runs + r);
    int j = k0 > r * L ? k0 - r * L : 0;
    const int end = k1 < (r + 1) * L ? k1 - r * L : L;
    const T* x[P];
#pragma unroll
    for (int p = 0; p < P; ++p) x[p] = buf + offset[p] + run + j;
    if (aligned && run % 4 == 0 && j % 4 == 0 && j + 4 <= end) {
      // Weights come from L2: four rows are on their way while four are used; those past the last are slack.
      Four<T> rows[4];
#pragma unroll
      for (int k = 0; k < 4; ++k, w += row_length) rows[k] = fixed4(w);
      for (; j + 4 <= end; j += 4) {
        Four<T> xs[P];
#pragma unroll
        for (int p = 0; p < P; ++p) xs[p] = load4(x[p]), x[p] += 4;
#pragma unroll
        for (int k = 0; k < 4; ++k, w += row_length) {
#pragma unroll
          for (int p = 0; p < P; ++p)
#pragma unroll
            for (int o = 0; o < 4; ++o) acc[p][o] += xs[p].v[k] * rows[k].v[o];
          rows[k] = fixed4(w);
        }
      }
      w -= 4 * row_length;
    }
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
    for (int i = 0; i < end - j; ++i, w += row_length) {
      const Four<T> ws = fixed4(w);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const T xs = x[p][i];
#pragma unroll
        for (int o = 0; o < 4; ++o) acc[p][o] += xs * ws.v[o];
      }
    }
  }
}

template <class T>
GK_RECORD void run(const WindowRecord& op, const Tile<T> t) {
  const bool whole = op.whole_block;
  const int W = op.W, each = whole ? 1 : op.H * W, positions = t.count * each, O = op.O, groups = op.groups;
  const int C = op.C, L = op.run_length, K = static_cast<int>(op.runs) * L, row_length = weight_row(O);
  // A whole-block record may use all of the workspace; other records have their scratch there.
  const WindowShape s = window_shape<kPositions>(positions, O, groups, K, t.warps(), whole ? t.args.workspace : 0);
  const int step = ((K + s.split - 1) / s.split + 3) / 4 * 4;
  const bool aligned =
      ((op.src.offset | op.src.sample | (whole ? 0 : op.src.position) | (whole ? 0 : op.src.row) | C) & 3) == 0;
  const Divider samples(each), rows(W);
  const T* bias = t.args.packed + op.bias;
  T* parts = t.buf;  // [part][tile][4 · 4][lane]

  // A lane's position p, counted over all samples.
  const auto position = [&](const WindowShape::Share& own, int p) {
    return (own.tile * kPositions + p) * s.position_lanes + own.lane;
  };
  const auto at = [&](const Place& place, int position) {
    const auto [m, q] = samples.parts(position);
    const auto [h, w] = rows.parts(q);
    return t.at(place, m, 0, h, w);
  };
  for (int item = t.warp(); item < s.tiles * s.split; item += t.warps()) {
    const int tile = item % s.tiles, part = item / s.tiles;
    const WindowShape::Share own = s.share(tile, t.lane());
    const bool on = own.channel < O;
    int offset[kPositions];
#pragma unroll
    for (int p = 0; p < kPositions; ++p)
      offset[p] =
          static_cast<int>(at(op.src, position(own, p) < positions ? position(own, p) : 0) - t.buf) + own.group * C;
    T acc[kPositions][4] = {};
    const T* w = t.args.packed + op.weights + own.group * K * row_length + (on ? own.channel : 0);
    const int k0 = part * step, k1 = k0 + step < K ? k0 + step : K;
    if (k0 < k1) window_sum(acc, t.buf, offset, aligned, t.args.tables + op.run_table, L, w, row_length, k0, k1);
    const T* b = bias + own.group * row_length + own.channel;
#pragma unroll
    for (int p = 0; p < kPositions; ++p) {
      if (s.split > 1) {
#pragma unroll
        for (int k = 0; k < 4; ++k) parts[((part * s.tiles + tile) * 16 + p * 4 + k) * kWarp + t.lane()] = acc[p][k];
      } else if (on && position(own, p) < positions) {
        T* y = at(op.dst, position(own, p)) + own.group * O + own.channel;
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (own.channel + k < O) y[k] = acc[p][k] + fixed(b + k);
      }
    }
  }
  if (s.split == 1) return;
  __syncthreads();
  for (int i = t.tid(); i < s.tiles * 16 * kWarp; i += t.threads()) {
    const WindowShape::Share own = s.share(i / (16 * kWarp), i % kWarp);
    const int o = own.channel + i / kWarp % 4, p = position(own, i / (4 * kWarp) % 4);
    if (o >= O || p >= positions) continue;
    T sum = fixed(bias + own.group * row_length + o);
    for (int part = 0; part < s.split; ++part) sum += parts[part * s.tiles * 16 * kWarp + i];
    at(op.dst, p)[own.group * O + o] = sum;
  }
}

// A convolution with the ReLU or the pool after it: the result of the convolution stays in registers.
//
// The tiles are those above, but a thread's positions are whole pools.

template <class T, int Taps>
GK_DEVICE void window_pooled(const PooledWindowRecord& op, const Tile<T>& t) {
  constexpr int P = kPooled<T>, kPools = P / Taps;
  const int W = op.W, each = op.H * W, pools = t.count * each, O = op.O, L = op.run_length;
  const int K = static_cast<int>(op.runs) * L, row_length = weight_row(O);
  const int kh = op.pattern.kh, kw = op.pattern.kw, plane_bytes = op.pattern.plane_bytes;
  const WindowShape s = window_shape<P>(pools * Taps, O, 1, K, t.warps(), 0);
  const bool aligned = ((op.src.offset | op.src.sample | op.src.position | op.src.row | op.C) & 3) == 0;
  const bool together = O % 4 == 0 && by_fours(op.dst);
  const Divider samples(each), rows(W), columns(kw);
  for (int item = t.warp(); item < s.tiles; item += t.warps()) {
    const WindowShape::Share own = s.share(item, t.lane());
    const int o = own.channel, q0 = (own.tile * s.position_lanes + own.lane) * kPools;
    int m[kPools], q[kPools], offset[P];
#pragma unroll
    for (int i = 0; i < kPools; ++i) {
      const auto [sample, place] = samples.parts(q0 + i < pools ? q0 + i : 0);
      const auto [h, w] = rows.parts(place);
      m[i] = sample, q[i] = place;
#pragma unroll
      for (int j = 0; j < Taps; ++j) {
        const auto [jh, jw] = columns.parts(j);
        offset[i * Taps + j] = static_cast<int>(t.at(op.src, sample, 0, h * kh + jh, w * kw + jw) - t.buf);
      }
    }
    T acc[P][4] = {};
    window_sum(acc, t.buf, offset, aligned, t.args.tables + op.run_table, L,
               t.args.packed + op.weights + (o < O ? o : 0), row_length, 0, K);
    const Four<T> bias = fixed4(t.args.packed + op.bias + (o < O ? o : 0));
#pragma unroll
    for (int i = 0; i < kPools; ++i) {
      const bool on = o < O && q0 + i < pools;
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
      if (on) store_some(t.at(op.dst, m[i], 0, h, w) + o, winners.top, O - o, together);
      const bool even = !(t.lane() % s.channel_lanes & 1);
      store_bits(winners, t.bits(op.pattern, m[i]) + q[i] * Taps * plane_bytes + o / 8, plane_bytes, Taps,
                 on ? first_bits(O - o) : 0u, on && even, s.channel_lanes > 1);
    }
  }
}

template <class T>
GK_RECORD void run(const PooledWindowRecord& op, const Tile<T> t) {
  const int64_t taps = op.pattern.taps;
  taps == 1 ? window_pooled<T, 1>(op, t) : taps == 2 ? window_pooled<T, 2>(op, t) : window_pooled<T, 4>(op, t);
}

}  // namespace gradkern::cuda
