// Transposed convolutions in quads: where windows consist of aligned groups of four numbers.
//
// The workers of a warp go through all channels in step, four at a time.  A weight is then read once for all of them,
// sixteen bytes at a time, where scatter.cuh's walk over the live channels reads every worker's own.  A dead channel
// costs its multiply-adds, except where a worker is a whole warp: that skips it.  Pays where most channels are alive:
// behind a pool whose taps share one window, three in four are.
#pragma once
#include "scatter.cuh"

namespace gradkern::cuda {

// gradkern/device.py: QUADS, QUAD_SEEDS, QUAD_SUMS (for double: a third of them, as registers are few).
template <class T>
constexpr int kMaxQuads = sizeof(T) == 4 ? 6 : 3;  // of the window, per lane
constexpr int kQuadSeeds = 6;                      // per visit
template <class T>
constexpr int kQuadSums = sizeof(T) == 4 ? 18 : 6;  // quads times seeds: what the registers hold
constexpr int kMaxPlanes = 4;                       // taps of a pool that share a window

// The channels c0 … c0 + 31 of one visit: which are alive, and from which tap.
struct Channels {
  uint32_t alive, tap[kMaxPlanes - 1];
};
template <class T>
GK_DEVICE Channels channels_of(const Visit<T>& at, const Op& op, int planes, int c0) {
  Channels found{};
  if (!at.inside) return found;
  const int nb = op.nb, O = op.O;
  found.alive = live_word(at.plane, nb, c0, 0, O);
#pragma unroll
  for (int j = 1; j < kMaxPlanes; ++j)
    if (j < planes) {
      found.tap[j - 1] = live_word(at.plane + j * nb, nb, c0, 0, O);
      found.alive |= found.tap[j - 1];
    }
  return found;
}

// Where the taps' weights begin within a channel's row, as steps from the first tap's.
struct Taps {
  int first, step[kMaxPlanes - 1];

  GK_DEVICE int at(const Channels& channels, int bit, int planes) const {
    int offset = first + static_cast<int>(channels.tap[0] >> bit & 1) * step[0];
    if (planes > 2)
#pragma unroll
      for (int j = 1; j < kMaxPlanes - 1; ++j) offset += static_cast<int>(channels.tap[j] >> bit & 1) * step[j];
    return offset;
  }
};

template <class T, int NQ, int S>
GK_DEVICE void quads(const Op& op, const Tile<T>& t) {
  const int O = op.O, ldw = op.ldw, lanes = op.slots, mine = t.lane() % lanes, many = op.K / 4;
  const int planes = op.merged ? op.taps : 1, dst_s = op.dst_s;
  const bool alone = lanes == kWarp;
  const int32_t *windows = t.args.tables + op.table2, *rows = t.args.tables + op.table;
  Taps taps{fixed(rows), {}};
#pragma unroll
  for (int j = 1; j < kMaxPlanes; ++j)
    if (j < planes) taps.step[j - 1] = fixed(rows + j) - taps.first;
  for (int chunk = 0; chunk < many; chunk += lanes * NQ) {
    int offset[NQ], place[NQ];
#pragma unroll
    for (int v = 0; v < NQ; ++v) {
      const int k = chunk + v * lanes + mine;
      offset[v] = k < many ? fixed(windows + 4 * k) : -1;
      place[v] = k < many ? fixed(rows + planes + k) : 0;
    }
    const T* weights = t.args.packed + op.wb;
    over_bands(op, t, lanes, S, [&](const Visit<T>& at) {
      Four<T> sum[S][NQ] = {};
      for (int c0 = 0; c0 < O; c0 += 32) {
        const Channels channels = channels_of(at, op, planes, c0);
        for (int c = c0; c < O && c < c0 + 32; c += 4) {
          if (alone && !(channels.alive >> (c - c0) & 15)) continue;
          Four<T> g[S] = {};
#pragma unroll
          for (int s = 0; s < S; ++s)
            if (at.inside && s < at.seeds) g[s] = load4(at.from + s * at.stride + c);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int bit = c - c0 + k;
            const bool alive = channels.alive >> bit & 1;
            if (alone && !alive) continue;
            const T* w = weights + (c + k) * ldw + taps.at(channels, bit, planes);
            Four<T> ws[NQ];
#pragma unroll
            for (int v = 0; v < NQ; ++v) ws[v] = fixed4(w + place[v]);
#pragma unroll
            for (int s = 0; s < S; ++s) {
              const T gs = alive ? g[s].v[k] : T(0);
#pragma unroll
              for (int v = 0; v < NQ; ++v)
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[s][v].v[e] += gs * ws[v].v[e];
            }
          }
        }
      }
      if (!at.inside) return;
#pragma unroll
      for (int v = 0; v < NQ; ++v) {
        if (offset[v] < 0) continue;
#pragma unroll
        for (int s = 0; s < S; ++s) {
          if (s >= at.seeds) continue;
          T* y = at.to + s * dst_s + offset[v];
          Four<T> total = load4(y);
#pragma unroll
          for (int e = 0; e < 4; ++e) total.v[e] += sum[s][v].v[e];
          store4(y, total);
        }
      }
    });
  }
}

template <class T, int NQ, int S>
GK_DEVICE void quads_seeds(const Op& op, const Tile<T>& t, int seeds) {
  if constexpr (S > 1)
    if (seeds < S) return quads_seeds<T, NQ, S - 1>(op, t, seeds);
  quads<T, NQ, S>(op, t);
}

template <class T, int NQ>
GK_DEVICE void quads_lanes(const Op& op, const Tile<T>& t, int each) {
  if constexpr (NQ > 1)
    if (each < NQ) return quads_lanes<T, NQ - 1>(op, t, each);
  constexpr int kMost = kQuadSums<T> / NQ < kQuadSeeds ? kQuadSums<T> / NQ : kQuadSeeds;
  const int visits = (t.seeds + kMost - 1) / kMost;
  quads_seeds<T, NQ, kMost>(op, t, (t.seeds + visits - 1) / visits);
}

template <class T>
GK_DEVICE void run_quads(const Op& op, const Tile<T>& t) {
  const int lanes = op.slots;
  quads_lanes<T, kMaxQuads<T>>(op, t, (static_cast<int>(op.K) / 4 + lanes - 1) / lanes);
}

}  // namespace gradkern::cuda
