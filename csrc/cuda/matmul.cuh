// Products of two matrices of values: forward, and the cotangents of either side for all seeds.
//
// A thread computes 4 × 4 results.  Its rows and columns are a tile apart, so that neighbouring threads read
// neighbouring lines.  Every result has one owner, which adds its terms in order.
#pragma once
#include "device.cuh"

namespace gradkern::cuda {

// The places of a thread's four lines, of which there are `lines`, `tiles` apart.  Past the end it reads the first line
// again.
struct FourLines {
  int first, apart, lines, at[4];
  GK_DEVICE FourLines(int first, int apart, int lines, int step) : first(first), apart(apart), lines(lines) {
#pragma unroll
    for (int k = 0; k < 4; ++k) at[k] = (there(k) ? number(k) : first) * step;
  }
  GK_DEVICE int number(int k) const { return first + k * apart; }
  GK_DEVICE bool there(int k) const { return number(k) < lines; }
};

// `copies` of each of a sample's matrices: one per seed in the backward pass.  `add`: to the destination.
template <class T, class Op>
GK_DEVICE void matmul(const Op& op, int copies, bool add, const Tile<T>& t) {
  const int terms = op.terms, left_term = op.left_term, right_term = op.right.position;
  const int down = (op.rows + 3) / 4, across = (op.columns + 3) / 4;
  const Divider tiles(down * across), columns_of_tiles(across);
  over_copies(t, copies, static_cast<int>(op.matrices) * down * across, [&](int m, int s, int number) {
    const auto [h, tile] = tiles.parts(number);
    const auto [y, x] = columns_of_tiles.parts(tile);
    const FourLines rows(y, down, op.rows, op.left.position), columns(x, across, op.columns, op.right_column);
    const T* a = t.at(op.left, m, s, h);
    const T* b = t.at(op.right, m, s, h);
    T acc[4][4] = {};
    for (int k = 0; k < terms; ++k, a += left_term, b += right_term) {
      T xs[4], ws[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) xs[i] = a[rows.at[i]], ws[i] = b[columns.at[i]];
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[r][c] += xs[r] * ws[c];
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (!rows.there(r)) continue;
      T* line = t.at(op.dst, m, s, h, rows.number(r));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (!columns.there(c)) continue;
        T& to = line[columns.number(c)];
        to = add ? to + acc[r][c] : acc[r][c];
      }
    }
  });
}

template <class T>
GK_RECORD void run(const MatMulRecord& op, const Tile<T> t) {
  matmul(op, 1, false, t);
}

template <class T>
GK_RECORD void run(const MatMulTRecord& op, const Tile<T> t) {
  matmul(op, t.seeds, !op.assign, t);
}

}  // namespace gradkern::cuda
