// Transposed convolutions in quads, for windows that consist of aligned groups of four elements.
//
// The workers of a warp go through all channels in step, four at a time.  A weight is then read once for all of them,
// sixteen bytes at a time, where scatter.cuh's walk over the live channels reads every worker's own.  A dead channel
// costs its multiply-adds, unless the worker is a whole warp, which skips it.  This pays if most channels are alive:
// before a pool whose taps share one window, three in four are.
#pragma once
#include "scatter.cuh"

namespace gradkern::cuda {

// The starts of the taps' weights within a channel's row, as offsets from the first tap's.
struct Taps {
  int first, step[kQuadPlanes - 1];
};

// Four channels of a visit: bit k, whether the k-th is alive; where its weights begin, by the tap that it came from.
struct Nibble {
  uint32_t alive;
  int place[4];
};
GK_DEVICE Nibble nibble_of(const uint32_t (&words)[kQuadPlanes], int shift, const Taps& taps, int planes) {
  Nibble nibble{words[0] >> shift, {taps.first, taps.first, taps.first, taps.first}};
  const auto meet = [&](int j) {
    const uint32_t word = words[j] >> shift;
    nibble.alive |= word;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (word & 1u << k) nibble.place[k] = taps.first + taps.step[j - 1];
  };
  if (planes > 1) meet(1);
  if (planes > 2) meet(2), meet(3);
  return nibble;
}

// One visit: all channels, four at a time.  A lane's quads of a row are contiguous.
template <class T, int NQ, int S>
GK_DEVICE void visit_quads(const ScatterTRecord& op, const T* weights, const Visit<T>& at, const int (&offset)[NQ],
                           const Taps& taps, int planes, bool alone) {
  const int O = op.O, row_length = op.row_length, seed = op.dst.seed, plane_bytes = op.pattern.plane_bytes;
  constexpr bool kSkips = NQ == 2;  // a branch costs the others more than it saves
  const T* from[S];
  seed_starts(from, at.from, at.stride, at.seeds);
  Four<T> sum[S][NQ] = {};
  for (int c0 = 0; c0 < O; c0 += 32) {
    uint32_t words[kQuadPlanes] = {};
#pragma unroll
    for (int j = 0; j < kQuadPlanes; ++j)
      if (j < planes && at.inside)
        words[j] = live_word(at.plane ? at.plane + j * plane_bytes : nullptr, plane_bytes, c0, 0, O);
    for (int c = c0; c < O && c < c0 + 32; c += 4) {
      const Nibble four = nibble_of(words, c - c0, taps, planes);
      if (kSkips && alone && !(four.alive & 15)) continue;
      Four<T> g[S];
#pragma unroll
      for (int s = 0; s < S; ++s) g[s] = load4(from[s] + c);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool alive = four.alive & 1u << k;
        if (kSkips && alone && !alive) continue;
        const T* w = weights + ((c + k) * row_length + four.place[k]);
        Four<T> ws[NQ];
#pragma unroll
        for (int v = 0; v < NQ; ++v) ws[v] = fixed4(w + 4 * v);
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
      T* y = at.to + s * seed + offset[v];
      Four<T> total = load4(y);
#pragma unroll
      for (int e = 0; e < 4; ++e) total.v[e] += sum[s][v].v[e];
      store4(y, total);
    }
  }
}

template <class T, int NQ, int S>
GK_DEVICE void quads(const ScatterTRecord& op, const Tile<T>& t) {
  const int lanes = op.lanes, quad_count = op.window_elements / 4, planes = op.merged ? op.pattern.taps : 1;
  const int32_t *windows = t.args.tables + op.window_table, *rows = t.args.tables + op.tap_table;
  Taps taps{fixed(rows), {}};
#pragma unroll
  for (int j = 1; j < kQuadPlanes; ++j)
    if (j < planes) taps.step[j - 1] = fixed(rows + j) - taps.first;
  for (int chunk = 0; chunk < quad_count; chunk += lanes * NQ) {
    const int first_quad = chunk + t.lane() % lanes * NQ;
    int offset[NQ];
#pragma unroll
    for (int v = 0; v < NQ; ++v) offset[v] = first_quad + v < quad_count ? fixed(windows + 4 * (first_quad + v)) : -1;
    const T* weights = t.args.packed + op.weights + 4 * first_quad;
    over_bands<false>(op, t, lanes, S, [&](const Visit<T>& at) {
      visit_quads<T, NQ, S>(op, weights, at, offset, taps, planes, lanes == kWarp);
    });
  }
}

template <class T, int NQ>
GK_DEVICE void quads_of(const ScatterTRecord& op, const Tile<T>& t) {
  constexpr int kMost = kQuadSums<T> / NQ < kQuadSeeds ? kQuadSums<T> / NQ : kQuadSeeds;
  with_count<kMost>(seeds_together(t.seeds, kMost), [&]<int S>() { quads<T, NQ, S>(op, t); });
}

template <class T>
GK_RECORD void run_quads(const ScatterTRecord& op, const Tile<T> t) {
  const int lanes = op.lanes, each = (static_cast<int>(op.window_elements) / 4 + lanes - 1) / lanes;
  if (each <= 2) return quads_of<T, 2>(op, t);
  if (each <= 3 || kQuads<T> == 3) return quads_of<T, 3>(op, t);
  if constexpr (kQuads<T> > 3) each <= 5 ? quads_of<T, 5>(op, t) : quads_of<T, 6>(op, t);
}

}  // namespace gradkern::cuda
