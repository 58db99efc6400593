// Transposed convolutions with narrow windows, such as a first layer with few inputs and small kernels.
//
// With a window of six elements, a worker of scatter.cuh or quads.cuh has little work per channel.  Here four lanes
// share the channels of a position: each takes four neighbouring channels, and all of the window.  Their sums are then
// added up, and each lane writes a quarter of them.
#pragma once
#include "quads.cuh"

namespace gradkern::cuda {

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

}  // namespace gradkern::cuda
