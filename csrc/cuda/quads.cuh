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

// Transposed convolutions with narrow windows, such as a first layer with few inputs and small kernels.
//
// With a window of six elements, a worker of scatter.cuh or of quads has little work per channel.  Here four lanes
// share the channels of a position: each takes four neighbouring channels, and all of the window.  Their sums are then
// added up, and each lane writes a quarter of them.

// sums[i] of four lanes → their total of i = sublane · N/4 + j in sums[j].
template <class T, int Half, int N>
GK_DEVICE void add_halves(T (&sums)[N], bool upper, int lanes) {
#pragma unroll
  for (int i = 0; i < Half; ++i) {
    const T give = upper ? sums[i] : sums[i + Half];
    sums[i] = (upper ? sums[i + Half] : sums[i]) + __shfl_xor_sync(0xffffffffu, give, lanes);
  }
}
template <class T, int N>
GK_DEVICE void add_up(T (&sums)[N], int sublane) {
  static_assert(N % 4 == 0);
  add_halves<T, N / 2>(sums, sublane & 2, 2);
  add_halves<T, N / 4>(sums, sublane & 1, 1);
}

// One visit: a lane has four channels of every sixteen, and the whole window.
template <class T, int NV, int S>
GK_DEVICE void visit_narrow(const ScatterTRecord& op, const T* weights, const Visit<T>& at, int sublane, int first) {
  constexpr int kRowQuads = (NV + 3) / 4, kRow = 4 * kRowQuads, kSums = (NV * S + 3) / 4 * 4;
  const int O = op.O, width = op.window_elements, planes = op.merged ? op.pattern.taps : 1, rows = O / 4;
  const int seed = op.dst.seed, plane_bytes = op.pattern.plane_bytes;
  const Taps taps{0, {O * kRow, 2 * O * kRow, 3 * O * kRow}};
  const T* from[S];
  seed_starts(from, at.from, at.stride, at.seeds);
  T sums[kSums] = {};
  for (int c0 = 4 * sublane; c0 < (O + 15) / 16 * 16; c0 += 16) {
    const bool on = at.inside && c0 < O;
    const int c = on ? c0 : 0;
    uint32_t words[kQuadPlanes] = {};
#pragma unroll
    for (int j = 0; j < kQuadPlanes; ++j)
      if (on && j < planes) words[j] = at.plane ? at.plane[j * plane_bytes + c / 8] : 255u;
    const Nibble four = nibble_of(words, c % 8, taps, planes);
    const T* row = weights + c * kRowQuads;
    Four<T> g[S];
#pragma unroll
    for (int s = 0; s < S; ++s) g[s] = load4(from[s] + c);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool alive = four.alive & 1u << k;
      // Channels four apart are adjacent in memory, because the lanes read them together.
      const T* w = row + (k * rows * kRow + four.place[k]);
      Four<T> ws[kRowQuads];
#pragma unroll
      for (int v = 0; v < kRowQuads; ++v) ws[v] = fixed4(w + 4 * v);
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const T gs = alive ? g[s].v[k] : T(0);
#pragma unroll
        for (int e = 0; e < NV; ++e) sums[s * NV + e] += gs * ws[e / 4].v[e % 4];
      }
    }
  }
  add_up(sums, sublane);
  if (!at.inside) return;
#pragma unroll
  for (int i = 0; i < kSums / 4; ++i) {
    const int place = sublane * (kSums / 4) + i, s = place / NV, e = place - s * NV;
    if (s < at.seeds && e < width) at.to[s * seed + first + e] += sums[i];
  }
}

template <class T, int NV, int S>
GK_DEVICE void narrow(const ScatterTRecord& op, const Tile<T>& t) {
  const int first = fixed(t.args.tables + op.window_table);
  const T* weights = t.args.packed + op.weights;
  over_bands<false>(op, t, kNarrowLanes, S, [&](const Visit<T>& at) {
    visit_narrow<T, NV, S>(op, weights, at, t.lane() % kNarrowLanes, first);
  });
}

template <class T>
GK_RECORD void run_narrow(const ScatterTRecord& op, const Tile<T> t) {
  const int width = op.window_elements;
  with_count<kNarrowSeeds<T>>(seeds_together(t.seeds, kNarrowSeeds<T>), [&]<int S>() {
    width <= 4 ? narrow<T, 4, S>(op, t) : width <= 6 ? narrow<T, 6, S>(op, t) : narrow<T, kNarrow, S>(op, t);
  });
}

// A function between the chain and those of quads and narrow windows, for the reason that device.cuh gives at
// `half_word`: called from the chain itself, they would be compiled for shared addresses.
template <class T>
GK_RECORD void run(const ScatterTRecord& op, const Tile<T> t) {
  switch (op.algorithm) {
    case ScatterAlgorithm::Walk: return run_walk(op, t);
    case ScatterAlgorithm::Quads: return run_quads(op, t);
    case ScatterAlgorithm::Narrow: return run_narrow(op, t);
  }
}

}  // namespace gradkern::cuda
