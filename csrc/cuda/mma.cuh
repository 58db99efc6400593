// Contractions on the tensor cores: one bf16 product, one TF32 product, or three of those for nearly fp32 accuracy.
//
// x = high + low, both TF32, keeps 22 bits; high·high + high·low + low·high loses 2^-22 of each product.  The tensor
// core's own sums are cut off, not rounded, so TF32's run over eight terms alone and join the total in fp32.  Beside
// the rounding of bf16 operands that is nothing, and sums stay in the tensor core.
//
// A warp makes MT·16 rows × NT·8 columns.  Lane (g = lane / 4, t = lane % 4) holds, of the contraction's index, the
// four neighbours 4t … 4t+3 of each sixteen: one 16-byte load gives a row's part of two instructions, whose indices
// are permuted the same way on both sides.
#pragma once
#include "tile.cuh"

namespace gradkern::cuda {

// Both halves of a number; `low` stays unused for a single product.
struct Halves {
  uint32_t high, low;
};
template <int Math>
GK_DEVICE Halves halves(float x) {
  const uint32_t high = to_tf32(x);
  return {high, Math == kTf32x3 ? to_tf32(x - bits_float(high)) : 0u};
}

// sum += A · B over eight terms.  A: rows g, g + 8 at k = t, then at k = t + 4.  B: column g at k = t, t + 4.
template <int Math>
GK_DEVICE void mma_step(float (&sum)[4], const Halves (&a)[4], const Halves (&b)[2]) {
  float part[4] = {};
  if constexpr (Math == kTf32x3) {
    mma_tf32(part, a[0].low, a[1].low, a[2].low, a[3].low, b[0].high, b[1].high);
    mma_tf32(part, a[0].high, a[1].high, a[2].high, a[3].high, b[0].low, b[1].low);
  }
  mma_tf32(part, a[0].high, a[1].high, a[2].high, a[3].high, b[0].high, b[1].high);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += part[i];
}

// sum[m][n] += A · B over sixteen terms.  A lane gives four of them: `row(m, r, j)` of its rows g and g + 8,
// and `column(n, j)` of its column; which four does not matter, as long as both sides agree.
template <int Math, int MT, int NT, class Row, class Column>
GK_DEVICE void mma_sixteen(float (&sum)[MT][NT][4], const Row& row, const Column& column) {
  if constexpr (Math == kBf16) {
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = to_bf16x2(row(m, i % 2, i / 2 * 2), row(m, i % 2, i / 2 * 2 + 1));
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint32_t b0 = to_bf16x2(column(n, 0), column(n, 1)), b1 = to_bf16x2(column(n, 2), column(n, 3));
#pragma unroll
      for (int m = 0; m < MT; ++m) mma_bf16(sum[m][n], a[m][0], a[m][1], a[m][2], a[m][3], b0, b1);
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // eight of the sixteen terms
      Halves a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = halves<Math>(row(m, i % 2, 2 * half + i / 2));
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        Halves b[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) b[j] = halves<Math>(column(n, 2 * half + j));
#pragma unroll
        for (int m = 0; m < MT; ++m) mma_step<Math>(sum[m][n], a[m], b);
      }
    }
  }
}

// sum[m][n] += Σ_{k0 ≤ k < k1} x[row[m][·] + at(k)] · w[k · ldw + column], columns n·8 + g for this lane; `x` in
// shared memory, `w` in global memory, columns from `width` on are zero.  `joined`: at(k) = k, 16-byte aligned;
// otherwise at(k) is read from `table`.  All lanes of a warp come here together.
template <int Math, int MT, int NT>
GK_DEVICE void mma_sum(float (&sum)[MT][NT][4], const float* x, const int (&row)[MT][2], const int32_t* table,
                       bool joined, const float* w, int ldw, int width, int lane, int k0, int k1) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = k0; k < k1; k += 16) {
    const int mine = k + 4 * t;
    float xs[MT][2][4];
    if (joined && k + 16 <= k1) {
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Four<float> four = load4(x + row[m][r] + mine);
#pragma unroll
          for (int j = 0; j < 4; ++j) xs[m][r][j] = four.v[j];
        }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool in = mine + j < k1;
        const int at = !in ? 0 : joined ? mine + j : fixed(table + mine + j);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int r = 0; r < 2; ++r) xs[m][r][j] = in ? x[row[m][r] + at] : 0.0f;
      }
    }
    mma_sixteen<Math, MT, NT>(
        sum, [&](int m, int r, int j) { return xs[m][r][j]; },
        [&](int n, int j) {
          const int column = n * 8 + g;
          return column < width && mine + j < k1 ? fixed(w + (mine + j) * ldw + column) : 0.0f;
        });
  }
}

// Where sum[m][n][i] of a lane belongs.
GK_DEVICE int mma_row(int lane, int m, int i) { return m * 16 + lane / 4 + i / 2 * 8; }
GK_DEVICE int mma_column(int lane, int n, int i) { return n * 8 + lane % 4 * 2 + i % 2; }

// ---- forward ---------------------------------------------------------------------------------------------------

template <int Math, int MT, int NT>
GK_DEVICE void window_mma(const Op& op, const Tile<float>& t) {
  const int W = op.W, HW = static_cast<int>(op.H) * W, each = op.block ? 1 : HW, positions = t.count * each;
  const int O = op.O, groups = op.groups, K = op.K, ldf = op.ldw;
  const int px = op.block ? 0 : op.sw * op.src_px, down = op.block ? 0 : op.sh * op.src_row;
  const int across = (O + NT * 8 - 1) / (NT * 8), along = (positions + MT * 16 - 1) / (MT * 16);
  const int tiles = across * along * groups, sums = MT * NT * 4 * kWarp;
  int split = op.block ? t.warps() / tiles : 1;  // as in window.cuh
  if (split > K / 32) split = K / 32;
  if (split > t.args.region / (tiles * sums)) split = t.args.region / (tiles * sums);
  if (split < 1) split = 1;
  const int step = ((K + split - 1) / split + 15) / 16 * 16;
  const bool joined = op.R == 1 && ((op.src | op.src_n | px | down | op.C) & 3) == 0;
  const auto place = [&](int at) {
    const int m = at / each, q = at - m * each, h = q / W;
    return static_cast<int>(t.at(op.src, op.src_n, m) - t.buf) + h * down + (q - h * W) * px;
  };
  const auto put = [&](int at, int o, int group, float value) {
    if (at >= positions || o >= O) return;
    const int m = at / each, q = at - m * each, h = q / W;
    t.at(op.dst, op.dst_n,
         m)[h * static_cast<int>(op.dst_row) + (q - h * W) * static_cast<int>(op.dst_px) + group * O + o] =
        value + fixed(t.args.packed + op.bias + group * ldf + o);
  };
  for (int item = t.warp(); item < tiles * split; item += t.warps()) {
    const int tile = item % tiles, part = item / tiles, group = tile / (across * along);
    const int rest = tile - group * (across * along), o = rest % across * (NT * 8), p0 = rest / across * (MT * 16);
    int row[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = p0 + mma_row(t.lane(), m, 2 * r);
        row[m][r] = place(at < positions ? at : 0) + group * static_cast<int>(op.C);
      }
    float sum[MT][NT][4] = {};
    const int k0 = part * step, k1 = k0 + step < K ? k0 + step : K;
    mma_sum<Math, MT, NT>(sum, t.buf, row, t.args.tables + op.table2, joined,
                          t.args.packed + op.wf + group * K * ldf + o, ldf, O - o, t.lane(), k0, k1);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (split > 1)
            t.buf[((part * tiles + tile) * (MT * NT * 4) + (m * NT + n) * 4 + i) * kWarp + t.lane()] = sum[m][n][i];
          else put(p0 + mma_row(t.lane(), m, i), o + mma_column(t.lane(), n, i), group, sum[m][n][i]);
  }
  if (split == 1) return;
  __syncthreads();
  for (int i = t.tid(); i < tiles * sums; i += t.threads()) {
    const int lane = i % kWarp, slot = i / kWarp % (MT * NT * 4), tile = i / sums, group = tile / (across * along);
    const int rest = tile - group * (across * along);
    float sum = 0;
    for (int part = 0; part < split; ++part) sum += t.buf[part * tiles * sums + i];
    put(rest / across * (MT * 16) + mma_row(lane, slot / (NT * 4), slot % 4),
        rest % across * (NT * 8) + mma_column(lane, slot / 4 % NT, slot % 4), group, sum);
  }
}

template <int Math>
GK_RECORD void run_window_mma(const Op& op, const Tile<float> t) {
  const int positions = t.count * (op.block ? 1 : static_cast<int>(op.H * op.W));
  if (op.O <= 8) return window_mma<Math, 2, 1>(op, t);
  if (positions <= 16) return window_mma<Math, 1, 4>(op, t);
  window_mma<Math, 2, 2>(op, t);  // 2 × 4 would spill
}

// ---- linear layers backward: rows of the region ([row][stride]) times the weight ------------------------------

template <int Math, int MT, int NT>
GK_DEVICE void product_mma(const Op& op, const Tile<float>& t, int rows, int stride, int c0, int channels,
                           bool assign) {
  const int columns = op.K, ldw = op.ldw;
  const int down = (rows + MT * 16 - 1) / (MT * 16), across = (columns + NT * 8 - 1) / (NT * 8);
  const int32_t* table = t.args.tables + op.table2;
  for (int item = t.warp(); item < down * across; item += t.warps()) {
    const int col = item / down * (NT * 8), r0 = item % down * (MT * 16);
    int row[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = r0 + mma_row(t.lane(), m, 2 * r);
        row[m][r] = (at < rows ? at : 0) * stride;
      }
    float sum[MT][NT][4] = {};
    mma_sum<Math, MT, NT>(sum, t.buf, row, nullptr, true, t.args.packed + op.wb + c0 * ldw + col, ldw, columns - col,
                          t.lane(), 0, channels);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = r0 + mma_row(t.lane(), m, i);
        if (r >= rows) continue;
        const int sample = r / t.seeds, s = r - sample * t.seeds;
        float* y = t.at(op.dst, op.dst_n, sample) + s * static_cast<int>(op.dst_s);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int c = col + mma_column(t.lane(), n, i);
          if (c >= columns) continue;
          float* at = y + (op.size ? c : fixed(table + c));
          *at = assign ? sum[m][n][i] : *at + sum[m][n][i];
        }
      }
  }
}

}  // namespace gradkern::cuda
