// Transposed convolutions with narrow windows: a first layer's, of few inputs and small kernels.
//
// A window of six numbers gives a worker of scatter.cuh or quads.cuh little to do per channel.  Here four lanes share
// the channels of a position, four neighbours each, every lane for the whole window; their sums are then added up, and
// each lane writes a quarter of them.
#pragma once
#include "quads.cuh"

namespace gradkern::cuda {

constexpr int kNarrow = 8;       // numbers of a window at most; gradkern/device_cost.py: NARROW
constexpr int kNarrowLanes = 4;  // of a worker
constexpr int kNarrowSeeds = 5;  // per visit; NARROW_SEEDS

// sums[i] of four lanes → their total of i = mine · N/4 + j in sums[j].
template <class T, int N>
GK_DEVICE void add_up(T (&sums)[N], int mine) {
  static_assert(N % 4 == 0);
#pragma unroll
  for (int step = 2; step; step /= 2) {
    const int half = N * step / 4;
    const bool upper = mine & step;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i >= half) continue;
      const T give = upper ? sums[i] : sums[i + half];
      sums[i] = (upper ? sums[i + half] : sums[i]) + __shfl_xor_sync(0xffffffffu, give, step);
    }
  }
}

template <class T, int NV, int S>
GK_DEVICE void narrow(const Op& op, const Tile<T>& t) {
  constexpr int kQuadsPerRow = (NV + 3) / 4, kRow = 4 * kQuadsPerRow, kSums = (NV * S + 3) / 4 * 4;
  const int O = op.O, width = op.K, planes = op.merged ? op.taps : 1, mine = t.lane() % kNarrowLanes;
  const int dst_s = op.dst_s, first = fixed(t.args.tables + op.table2), rows = O / 4;
  Taps taps{0, {O * kRow, 2 * O * kRow, 3 * O * kRow}};
  over_bands(op, t, kNarrowLanes, S, [&](const Visit<T>& at) {
    T sums[kSums] = {};
    for (int c = 4 * mine; c < (O + 15) / 16 * 16; c += 16) {
      const bool on = at.inside && c < O;
      const Channels channels = on ? channels_of(at, op, planes, c & ~31) : Channels{};
      Four<T> g[S] = {};
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (on && s < at.seeds) g[s] = load4(at.from + s * at.stride + c);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int bit = (c & 31) + k;
        const bool alive = channels.alive >> bit & 1;
        // Channels four apart lie side by side, as the lanes read them.
        const T* w = t.args.packed + op.wb + (k * rows + (on ? c / 4 : 0)) * kRow + taps.at(channels, bit, planes);
        Four<T> ws[kQuadsPerRow];
#pragma unroll
        for (int v = 0; v < kQuadsPerRow; ++v) ws[v] = fixed4(w + 4 * v);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const T gs = alive ? g[s].v[k] : T(0);
#pragma unroll
          for (int e = 0; e < NV; ++e) sums[s * NV + e] += gs * ws[e / 4].v[e % 4];
        }
      }
    }
    add_up(sums, mine);
    if (!at.inside) return;
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      const int place = mine * (kSums / 4) + i, s = place / NV, e = place - s * NV;
      if (s < at.seeds && e < width) at.to[s * dst_s + first + e] += sums[i];
    }
  });
}

template <class T, int NV, int S>
GK_DEVICE void narrow_seeds(const Op& op, const Tile<T>& t, int seeds) {
  if constexpr (S > 1)
    if (seeds < S) return narrow_seeds<T, NV, S - 1>(op, t, seeds);
  narrow<T, NV, S>(op, t);
}

template <class T>
GK_DEVICE void run_narrow(const Op& op, const Tile<T>& t) {
  const int width = op.K, visits = (t.seeds + kNarrowSeeds - 1) / kNarrowSeeds, seeds = (t.seeds + visits - 1) / visits;
  if (width <= 4) narrow_seeds<T, 4, kNarrowSeeds>(op, t, seeds);
  else if (width <= 6) narrow_seeds<T, 6, kNarrowSeeds>(op, t, seeds);
  else narrow_seeds<T, 8, kNarrowSeeds>(op, t, seeds);
}

}  // namespace gradkern::cuda
