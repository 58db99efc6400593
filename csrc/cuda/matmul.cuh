// Products of two matrices of values, H of them per sample: forward, and the cotangents of either side for all seeds.
//
// A thread computes 4 × 4 results, or 1 × 4 if 4 × 4 would leave too many threads without work.  Every result has one
// owner, which adds its terms in an order that depends only on the result's column, and not on its neighbours or on the
// number of samples and seeds.
#pragma once
#include "device.cuh"

namespace gradkern::cuda {

// How a thread reads four terms of its lines (rows of the left side, columns of the right one).
enum class Reading {
  kScattered,  // number by number; its lines are a tile apart, so that neighbouring threads read neighbouring lines
  kTerms,      // terms are contiguous: four terms of a line at once
  kLines,      // lines are contiguous: one term of four lines at once
};

// One of the two factors.
struct Factor {
  const Place& place;  // row: from one matrix to the next
  int line, term;      // steps from one line and one term to the next
};

struct MatMul {
  Factor left, right;
  int planes, copies;  // matrices of a sample, and copies of each: one per seed in the backward pass
  int rows, columns, terms;
  bool add;  // to the destination
};

GK_DEVICE Reading reading_of(const Factor& f, int lines, int at_once) {
  if ((f.place.offset | f.place.sample | f.place.seed | f.place.row) & 3) return Reading::kScattered;
  if (f.term == 1 && f.line % 4 == 0) return Reading::kTerms;
  return at_once == 4 && f.line == 1 && f.term % 4 == 0 && lines % 4 == 0 ? Reading::kLines : Reading::kScattered;
}

// x[i][k] = term k of the line at[i].
template <class T, int N>
GK_DEVICE void take(T (&x)[N][4], const T* p, const int (&at)[N], int term, Reading how) {
  if (how == Reading::kTerms) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Four<T> four = load4(p + at[i]);
#pragma unroll
      for (int k = 0; k < 4; ++k) x[i][k] = four.v[k];
    }
  } else if (N == 4 && how == Reading::kLines) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const Four<T> four = load4(p + at[0] + k * term);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i][k] = four.v[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) x[i][k] = p[at[i] + k * term];
  }
}

// A thread's lines of a side: the first, and the step to the next.  Past the end it reads the first line again.
template <int N>
struct TileLines {
  int first, step, at[N];
  GK_DEVICE TileLines(const Factor& f, Reading how, int tile, int tiles, int lines)
      : first(how == Reading::kLines ? 4 * tile : tile), step(how == Reading::kLines ? 1 : tiles) {
#pragma unroll
    for (int i = 0; i < N; ++i) at[i] = (first + i * step < lines ? first + i * step : first) * f.line;
  }
};

// acc[p][o] = Σ_k a[p][k] b[o][k], from the fourth term `start` on and around.
template <class T, int R>
GK_DEVICE void matmul_sum(T (&acc)[R][4], const T* a, const int (&at_a)[R], int term_a, Reading left, const T* b,
                          const int (&at_b)[4], int term_b, Reading right, int terms, int start) {
  const int fours = terms / 4;
  for (int n = 0, at = fours ? start % fours : 0; n < fours; ++n) {
    T x[R][4], w[4][4];
    take(x, a + 4 * at * term_a, at_a, term_a, left);
    take(w, b + 4 * at * term_b, at_b, term_b, right);
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int p = 0; p < R; ++p)
#pragma unroll
        for (int o = 0; o < 4; ++o) acc[p][o] += x[p][k] * w[o][k];
    if (++at == fours) at = 0;
  }
  for (int k = 4 * fours; k < terms; ++k) {
    T w[4];
#pragma unroll
    for (int o = 0; o < 4; ++o) w[o] = b[at_b[o] + k * term_b];
#pragma unroll
    for (int p = 0; p < R; ++p) {
      const T x = a[at_a[p] + k * term_a];
#pragma unroll
      for (int o = 0; o < 4; ++o) acc[p][o] += x * w[o];
    }
  }
}

// R × 4 results per thread.  If the stride of columns is a multiple of the banks, neighbouring threads start at
// different terms, to avoid bank conflicts.
template <class T, int R>
GK_DEVICE void matmul_tiles(const MatMulRecord& op, const Tile<T>& t, const MatMul& p) {
  const Reading left = reading_of(p.left, p.rows, R), right = reading_of(p.right, p.columns, 4);
  const int along = (p.rows + R - 1) / R, across = (p.columns + 3) / 4, tiles = along * across;
  const bool together = right == Reading::kLines && by_fours(op.dst);
  for (int i = t.tid(); i < t.count * p.copies * p.planes * tiles; i += t.threads()) {
    const int q = i / tiles, tile = i - q * tiles, ms = q / p.planes, h = q - ms * p.planes;
    const int m = ms / p.copies, s = ms - m * p.copies, down = tile / across, over = tile - down * across;
    const TileLines<R> rows(p.left, left, down, along, p.rows);
    const TileLines<4> columns(p.right, right, over, across, p.columns);
    const T* a = t.at(p.left.place, m, s) + Steps(p.left.place)(h, 0);
    const T* b = t.at(p.right.place, m, s) + Steps(p.right.place)(h, 0);
    T acc[R][4] = {};
    matmul_sum<T, R>(acc, a, rows.at, p.left.term, left, b, columns.at, p.right.term, right, p.terms,
                     right == Reading::kTerms ? over : 0);
    T* y = t.at(op.dst, m, s) + Steps(op.dst)(h, 0);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (rows.first + r * rows.step >= p.rows) continue;
      T* row = y + Steps(op.dst)(0, rows.first + r * rows.step) + columns.first;
      if (together) {
        Four<T> sum = p.add ? load4(row) : Four<T>{};
#pragma unroll
        for (int o = 0; o < 4; ++o) sum.v[o] += acc[r][o];
        store4(row, sum);
        continue;
      }
#pragma unroll
      for (int o = 0; o < 4; ++o)
        if (columns.first + o * columns.step < p.columns) {
          T& to = row[o * columns.step];
          to = p.add ? to + acc[r][o] : acc[r][o];
        }
    }
  }
}

// Issued instructions of the busiest thread with tiles of `height` rows; gradkern/codegen/cuda/clock_model.py:
// Work.matmul.
GK_DEVICE int matmul_pace(const MatMul& p, int samples, int threads, int height) {
  const int tiles = samples * p.copies * p.planes * ((p.rows + height - 1) / height) * ((p.columns + 3) / 4);
  return (tiles + threads - 1) / threads * (100 + 16 * height + p.terms * 4 * (height + 1));
}

// Forward and backward share their code: fitting the instruction cache is worth more than avoiding a branch.
template <class T>
GK_RECORD void run_matmul(const Record& record, const Tile<T> t) {
  const auto& op = as<MatMulRecord>(record);  // as a MatMulTRecord begins
  const bool back = record.kind == Kind::MatMulT;
  const MatMul p{{op.left, static_cast<int>(op.left.position), static_cast<int>(op.left_term)},
                 {op.right, static_cast<int>(op.right_column), static_cast<int>(op.right.position)},
                 static_cast<int>(op.matrices),
                 back ? t.seeds : 1,
                 static_cast<int>(op.rows),
                 static_cast<int>(op.columns),
                 static_cast<int>(op.terms),
                 back && !as<MatMulTRecord>(record).assign};
  if (matmul_pace(p, t.count, t.threads(), 4) <= matmul_pace(p, t.count, t.threads(), 1)) matmul_tiles<T, 4>(op, t, p);
  else matmul_tiles<T, 1>(op, t, p);
}

}  // namespace gradkern::cuda
