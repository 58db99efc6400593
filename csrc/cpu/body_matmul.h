// Products of two matrices of values, H of them per sample.  Included by body.h.

// y[m][n] (+)= Σ_k a[m·a_row + k·a_term] b[k][n]: PB rows × NV vectors of columns in registers.
template <class T>
struct MatMulArgs {
  const T* a;
  int64_t a_row, a_term;
  const T* b;
  int64_t b_term;
  T* y;
  int64_t y_row;
  int64_t terms;
  int64_t tail;  // live lanes of the last vector; the other lanes are read and dropped
  bool add;
};

template <class T, int PB, int NV>
void matmul_tile(const MatMulArgs<T>& m) {
  constexpr int VL = Simd<T>::VL;
  Vec<T> acc[PB][NV];
#pragma GCC unroll 16
  for (int p = 0; p < PB; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[p][v] = Vec<T>{};
  const T *a = m.a, *b = m.b;
  for (int64_t k = 0; k < m.terms; ++k, a += m.a_term, b += m.b_term) {
    Vec<T> bv[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) bv[v] = load<T>(b + v * VL);
#pragma GCC unroll 16
    for (int p = 0; p < PB; ++p) {
      const Vec<T> ab = bcast<T>(a[p * m.a_row]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[p][v] += ab * bv[v];
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < PB; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      T* y = m.y + p * m.y_row + v * VL;
      const Vec<T> sum = m.add ? load<T>(y) + acc[p][v] : acc[p][v];
      if (v + 1 < NV || m.tail == VL) store<T>(y, sum);
      else store_n<T>(y, sum, m.tail);
    }
}

template <class T, int NV, int PB>
GK_INLINE void matmul_tail(const MatMulArgs<T>& m, int64_t count) {
  if constexpr (PB > 0) {
    if (count == PB) matmul_tile<T, PB, NV>(m);
    else matmul_tail<T, NV, PB - 1>(m, count);
  }
}

template <class T, int NV>
void matmul_rows(MatMulArgs<T> m, int64_t rows) {
  constexpr int PB = max_positions(NV);
  while (rows > 0) {
    const int64_t step = next_tile(rows, PB);
    matmul_tail<T, NV, PB>(m, step);
    m.a += step * m.a_row;
    m.y += step * m.y_row;
    rows -= step;
  }
}

template <class T>
void matmul(MatMulArgs<T> m, int64_t rows, int64_t columns) {
  constexpr int VL = Simd<T>::VL;
  const int64_t vectors = (columns + VL - 1) / VL;
  for (int64_t v = 0, tiles = (vectors + kMaxNV - 1) / kMaxNV; v < vectors; --tiles) {
    const int64_t nv = (vectors - v + tiles - 1) / tiles;
    m.tail = v + nv == vectors ? columns - (vectors - 1) * VL : VL;
    with_vectors(nv, [&](auto count) { matmul_rows<T, decltype(count)::value>(m, rows); });
    m.b += nv * VL;
    m.y += nv * VL;
    v += nv;
  }
}

// Multiplies every matrix of a sample (for cotangents, also of each seed).
template <class T, class R>
void matmul_all(const R& op, const T* left, const T* right, T* y, bool add) {
  for (int64_t h = 0; h < op.matrices; ++h)
    matmul<T>({left + h * op.left.row, op.left.position, op.left_term, right + h * op.right.row, op.right.position,
               y + h * op.dst.row, op.dst.position, op.terms, 0, add},
              op.rows, op.columns);
}

template <class T>
void run_matmul(const MatMulRecord& op, Context<T>& ctx, int64_t n) {
  matmul_all<T>(op, at(ctx, op.left, n), at(ctx, op.right, n), at(ctx, op.dst, n), false);
}

// One side has seeds, and the other does not.
template <class T>
void run_matmul_t(const MatMulTRecord& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    matmul_all<T>(op, at(ctx, op.left, n) + s * op.left.seed, at(ctx, op.right, n) + s * op.right.seed,
                  at(ctx, op.dst, n) + s * op.dst.seed, !op.assign);
}
