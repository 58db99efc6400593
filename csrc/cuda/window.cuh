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

// Four rows of the weight; `w` moves on.
template <class T>
GK_DEVICE void load_rows(Four<T> (&rows)[4], const T*& w, int row_length) {
#pragma unroll
  for (int k = 0; k < 4; ++k, w += row_length) rows[k] = fixed4(w);
}

// acc[p][o] += Σ_{k < 4} x[p][j + k] · rows[k][o].
template <class T, int P>
GK_DEVICE void four_terms(T (&acc)[P][4], const T* const (&x)[P], int j, const Four<T> (&rows)[4]) {
  Four<T> xs[P];
#pragma unroll
  for (int p = 0; p < P; ++p) xs[p] = load4(x[p] + j);
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int o = 0; o < 4; ++o) acc[p][o] += xs[p].v[k] * rows[k].v[o];
}

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
    for (int p = 0; p < P; ++p) x[p] = buf + offset[p] + run;
    if (aligned && run % 4 == 0 && j % 4 == 0 && j + 4 <= end) {
      // Weights come from L2: four rows are loading while four are used; those past the last are slack.
      Four<T> even[4], odd[4];
      load_rows(even, w, row_length);
      for (;;) {
        load_rows(odd, w, row_length);
        four_terms(acc, x, j, even);
        if ((j += 4) + 4 > end) {
          w -= 4 * row_length;
          break;
        }
        load_rows(even, w, row_length);
        four_terms(acc, x, j, odd);
        if ((j += 4) + 4 > end) {
          w -= 4 * row_length;
          break;
        }
      }
    }
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
    for (; j < end; ++j, w += row_length) {
      const Four<T> ws = fixed4(w);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const T xs = x[p][j];
#pragma unroll
        for (int o = 0; o < 4; ++o) acc[p][o] += xs * ws.v[o];
      }
    }
  }
}

template <class T>
GK_RECORD void run_window(const WindowRecord& op, const Tile<T> t) {
  const int W = op.W, HW = static_cast<int>(op.H) * W, each = op.whole_block ? 1 : HW, positions = t.count * each;
  const int O = op.O, groups = op.groups, L = op.run_length, K = static_cast<int>(op.runs) * L,
            row_length = weight_row(O);
  const int position = op.whole_block ? 0 : op.src.position, row = op.whole_block ? 0 : op.src.row;
  // A whole-block record may use all of the workspace; other records have their scratch there.
  const WindowShape s =
      window_shape<kPositions>(positions, O, groups, K, t.warps(), op.whole_block ? t.args.workspace : 0);
  const int step = ((K + s.split - 1) / s.split + 3) / 4 * 4;
  const int channel_lane = t.lane() % s.channel_lanes, position_lane = t.lane() / s.channel_lanes;
  const bool aligned = ((op.src.offset | op.src.sample | position | row | op.C) & 3) == 0;
  const Divider samples(each), rows(W);
  T* parts = t.buf;  // [part][tile][4 · 4][lane]

  for (int item = t.warp(); item < s.tiles * s.split; item += t.warps()) {
    const int tile = item % s.tiles, part = item / s.tiles;
    const int group = tile / (s.across * s.along), rest = tile - group * (s.across * s.along);
    const int o = rest % s.across * (s.channel_lanes * 4) + channel_lane * 4,
              p0 = rest / s.across * (s.position_lanes * kPositions) + position_lane;
    const bool on = o < O;
    int offset[kPositions];
#pragma unroll
    for (int p = 0; p < kPositions; ++p) {
      const int at = p0 + p * s.position_lanes < positions ? p0 + p * s.position_lanes : 0;
      const auto [m, q] = samples.parts(at);
      const auto [h, w] = rows.parts(q);
      offset[p] = static_cast<int>(t.at(op.src, m) - t.buf) + h * row + w * position + group * static_cast<int>(op.C);
    }
    T acc[kPositions][4] = {};
    const T* w = t.args.packed + op.weights + group * K * row_length + (on ? o : 0);
    const int k0 = part * step, k1 = k0 + step < K ? k0 + step : K;
    if (k0 < k1) window_sum(acc, t.buf, offset, aligned, t.args.tables + op.run_table, L, w, row_length, k0, k1);
    if (s.split > 1) {
#pragma unroll
      for (int p = 0; p < kPositions; ++p)
#pragma unroll
        for (int k = 0; k < 4; ++k) parts[((part * s.tiles + tile) * 16 + p * 4 + k) * kWarp + t.lane()] = acc[p][k];
      continue;
    }
    if (!on) continue;
    const T* bias = t.args.packed + op.bias + group * row_length + o;
#pragma unroll
    for (int p = 0; p < kPositions; ++p) {
      const int at = p0 + p * s.position_lanes;
      if (at >= positions) continue;
      const auto [m, q] = samples.parts(at);
      const auto [h, w] = rows.parts(q);
      T* y = t.at(op.dst, m) + Steps(op.dst)(h, w) + group * O + o;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (o + k < O) y[k] = acc[p][k] + fixed(bias + k);
    }
  }
  if (s.split == 1) return;
  __syncthreads();
  for (int i = t.tid(); i < s.tiles * 16 * kWarp; i += t.threads()) {
    const int lane = i % kWarp, number = i / kWarp % 16, tile = i / (16 * kWarp);
    const int group = tile / (s.across * s.along), rest = tile - group * (s.across * s.along);
    const int o = rest % s.across * (s.channel_lanes * 4) + lane % s.channel_lanes * 4 + number % 4;
    const int at =
        rest / s.across * (s.position_lanes * kPositions) + lane / s.channel_lanes + number / 4 * s.position_lanes;
    if (o >= O || at >= positions) continue;
    T sum = fixed(t.args.packed + op.bias + group * row_length + o);
    for (int part = 0; part < s.split; ++part) sum += parts[part * s.tiles * 16 * kWarp + i];
    const auto [m, q] = samples.parts(at);
    const auto [h, w] = rows.parts(q);
    t.at(op.dst, m)[Steps(op.dst)(h, w) + group * O + o] = sum;
  }
}

// A convolution with the ReLU or the pool after it: the result of the convolution stays in registers.
//
// The tiles are those above, but a thread's positions are whole pools.

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
