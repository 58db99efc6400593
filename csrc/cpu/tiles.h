// The two register-blocked inner loops that nearly all arithmetic runs through, and their dispatch tables.
namespace {

constexpr int kRegisters = GK_REGISTERS;

// ---- forward: PB positions × NV vectors of output channels ---------------------------------------------------
//   y[p][o] = bias[o] + Σ_r Σ_j x[p·x_position + run_starts[r] + j] · w[r·run_length + j][o]
template <class T>
struct WindowArgs {
  const int32_t* run_starts;
  int64_t runs, run_length;
  const T* w;     // [K][NV·VL] of this tile
  const T* bias;  // [NV·VL]
  int64_t tail;   // live lanes of the last vector
};

// Where positions are read and written: at a constant distance, or at listed addresses.
template <class T>
struct RowOfPositions {
  const T* x0;
  int64_t dx;
  T* y0;
  int64_t dy;
  GK_INLINE const T* x(int p) const { return x0 + p * dx; }
  GK_INLINE T* y(int p) const { return y0 + p * dy; }
};
constexpr int kListed = 8;  // positions whose addresses stay in general registers
template <class T>
struct ListOfPositions {
  const T* xs[kListed];
  T* ys[kListed];
  GK_INLINE const T* x(int p) const { return xs[p]; }
  GK_INLINE T* y(int p) const { return ys[p]; }
};

template <class T, int PB, int NV, class At>
void window_tile(const WindowArgs<T>& a, const At& at) {
  constexpr int VL = Simd<T>::VL;
  Vec<T> acc[PB][NV];
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    const Vec<T> b = load<T>(a.bias + v * VL);
#pragma GCC unroll 16
    for (int p = 0; p < PB; ++p) acc[p][v] = b;
  }
  const T* w = a.w;
  for (int64_t r = 0; r < a.runs; ++r) {
    const int64_t start = a.run_starts[r];
    for (int64_t j = start; j < start + a.run_length; ++j, w += NV * VL) {
      Vec<T> wv[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) wv[v] = load<T>(w + v * VL);
#pragma GCC unroll 16
      for (int p = 0; p < PB; ++p) {
        const Vec<T> xb = bcast<T>(at.x(p)[j]);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[p][v] += xb * wv[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < PB; ++p) {
#pragma GCC unroll 16
    for (int v = 0; v + 1 < NV; ++v) store<T>(at.y(p) + v * VL, acc[p][v]);
    if (a.tail == VL) store<T>(at.y(p) + (NV - 1) * VL, acc[p][NV - 1]);
    else store_n<T>(at.y(p) + (NV - 1) * VL, acc[p][NV - 1], a.tail);
  }
}

// The most positions that fit the register file together with NV weight vectors and one broadcast.
constexpr int max_positions(int nv) {
  int p = (kRegisters - nv - 1) / nv;
  return p > 12 ? 12 : (p < 1 ? 1 : p);
}
constexpr int kMaxNV = kRegisters >= 32 ? 4 : 2;  // more would leave accumulators for only two positions

template <class T, int NV, int PB, class At>
GK_INLINE void window_tail(const WindowArgs<T>& a, const At& at, int64_t count) {
  if constexpr (PB > 0) {
    if (count == PB) window_tile<T, PB, NV>(a, at);
    else window_tail<T, NV, PB - 1>(a, at, count);
  }
}

// How many of `count` positions come next.  Two even halves are faster than one full tile and a short rest.
GK_INLINE int64_t next_tile(int64_t count, int64_t most) {
  return count >= 2 * most ? most : (count > most ? (count + 1) / 2 : count);
}

template <class T, int NV>
void window_positions(const WindowArgs<T>& a, RowOfPositions<T> at, int64_t count) {
  constexpr int PB = max_positions(NV);
  while (count > 0) {
    const int64_t step = next_tile(count, PB);
    window_tail<T, NV, PB>(a, at, step);
    at.x0 += step * at.dx;
    at.y0 += step * at.dy;
    count -= step;
  }
}

// All positions of all samples of the block, so that weights are read once for each tile of them.
template <class T, int NV>
void window_samples(const WindowArgs<T>& a, const WindowRecord& op, const T* x, T* y, int64_t samples) {
  constexpr int PB = max_positions(NV) < kListed ? max_positions(NV) : kListed;
  int64_t n = 0, h = 0, w = 0;
  for (int64_t count = samples * op.H * op.W; count > 0;) {
    const int64_t step = next_tile(count, PB);
    ListOfPositions<T> at;
    for (int64_t p = 0; p < step; ++p) {
      at.xs[p] = x + n * op.src.sample + h * op.src.row + w * op.src.position;
      at.ys[p] = y + n * op.dst.sample + h * op.dst.row + w * op.dst.position;
      if (++w < op.W) continue;
      w = 0;
      if (++h < op.H) continue;
      h = 0;
      ++n;
    }
    window_tail<T, NV, PB>(a, at, step);
    count -= step;
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<nv>) for 1 ≤ nv ≤ kMaxNV.
template <int NV = kMaxNV, class F>
GK_INLINE void with_vectors(int64_t nv, const F& f) {
  if constexpr (NV > 1)
    if (nv < NV) return with_vectors<NV - 1>(nv, f);
  f(Constant<NV>{});
}

// ---- backward: S seeds × NV vectors of the window, over the live channels of each segment --------------------
//   out[s][dst + e] += Σ_{c live} g[s][src + c] · w[row(c)][e]
template <class T>
struct ScatterArgs {
  const Segment* segments;
  int64_t segment_count;
  const uint16_t* channels;  // live channels
  const uint16_t* rows;      // the weight rows of these channels
  const T* g;
  int64_t g_seed;  // seed stride of g
  T* out;
  int64_t out_seed;  // seed stride of out
  const T* w;
  int64_t row_length;
  const int32_t* window;  // pairs (destination offset, live lanes)
  bool assign;
};

template <class T, int S, int NV>
void scatter_tile(const ScatterArgs<T>& a) {
  constexpr int VL = Simd<T>::VL;
  for (int64_t k = 0; k < a.segment_count; ++k) {
    const Segment segment = a.segments[k];
    if (segment.count == 0 && !a.assign) continue;
    Vec<T> acc[S][NV];
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[s][v] = Vec<T>{};
    const T* g = a.g + segment.src;
    const uint16_t *channels = a.channels + segment.start, *rows = a.rows + segment.start;
    const int64_t g_seed = a.g_seed;
    for (int64_t i = 0; i < segment.count; ++i) {
      const int64_t c = channels[i];
      const T* w = a.w + rows[i] * a.row_length;
      Vec<T> gb[S];
#pragma GCC unroll 16
      for (int s = 0; s < S; ++s) gb[s] = bcast<T>(g[s * g_seed + c]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        const Vec<T> wv = load<T>(w + v * VL);
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s) acc[s][v] += gb[s] * wv;
      }
    }
    T* out = a.out + segment.dst;
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      T* o = out + a.window[2 * v];
      const int32_t n = a.window[2 * v + 1];
      if (a.assign) {
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s)
          n == VL ? store<T>(o + s * a.out_seed, acc[s][v]) : store_n<T>(o + s * a.out_seed, acc[s][v], n);
      } else {
        const IVec<T> mask = lanes<T>(n);  // dead lanes add an exact zero, even next to NaN
#pragma GCC unroll 16
        for (int s = 0; s < S; ++s)
          store<T>(o + s * a.out_seed, load<T>(o + s * a.out_seed) + keep<T>(acc[s][v], mask));
      }
    }
  }
}

constexpr int kMaxSeeds = kRegisters >= 32 ? 6 : 4;  // seeds per tile
// Vectors per tile for S seeds: accumulators, S broadcasts and one weight vector share the register file.
constexpr int max_vectors(int s) {
  int v = (kRegisters - 1 - s) / s;
  return v > 8 ? 8 : (v < 1 ? 1 : v);
}

template <class T, int S, int NV>
GK_INLINE void scatter_vectors(const ScatterArgs<T>& a, int nv) {
  if constexpr (NV > 0) {
    if (nv == NV) scatter_tile<T, S, NV>(a);
    else scatter_vectors<T, S, NV - 1>(a, nv);
  }
}

template <class T, int S>
GK_INLINE void scatter_seeds(const ScatterArgs<T>& a, int seeds, int nv) {
  if constexpr (S > 0) {
    if (seeds == S) scatter_vectors<T, S, max_vectors(S)>(a, nv);
    else scatter_seeds<T, S - 1>(a, seeds, nv);
  }
}

// All seeds and all vectors of the window, block by block.  Threads may share a tile of seeds, but only whole blocks of
// it, since the order of a seed's sums depends on its block.
template <class T>
void scatter(ScatterArgs<T> a, const Context<T>& ctx, int64_t vectors) {
  constexpr int VL = Simd<T>::VL;
  const T* g = a.g;
  T* out = a.out;
  const int64_t blocks = (ctx.tile_seeds + kMaxSeeds - 1) / kMaxSeeds;
  const T* w = a.w;
  const int32_t* table = a.window;
  for (int64_t b = 0, s0 = -ctx.tile_first; b < blocks && s0 < ctx.seeds; ++b) {
    const int64_t block_seeds = (ctx.tile_seeds - ctx.tile_first - s0 + (blocks - b) - 1) / (blocks - b);
    if (s0 < 0) {
      s0 += block_seeds;
      continue;
    }
    const int64_t most = max_vectors(static_cast<int>(block_seeds));
    const int64_t tiles = (vectors + most - 1) / most;
    for (int64_t t = 0, v0 = 0; t < tiles; ++t) {
      const int64_t nv = (vectors - v0 + (tiles - t) - 1) / (tiles - t);
      a.g = g + s0 * a.g_seed;
      a.out = out + s0 * a.out_seed;
      a.w = w + v0 * VL;
      a.window = table + 2 * v0;
      scatter_seeds<T, kMaxSeeds>(a, static_cast<int>(block_seeds), static_cast<int>(nv));
      v0 += nv;
    }
    s0 += block_seeds;
  }
}

}  // namespace
