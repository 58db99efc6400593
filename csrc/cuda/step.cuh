// The step kernel: one contraction of a layer that is too large for a chain, forward or transposed, all samples and
// seeds at once, as an implicit matrix product: rows × places by results, summed over taps and channels.
//
// A block of eight warps makes BM places × BN results.  Slices of sixteen terms go through shared memory, two buffers
// in turn, the next slice already on its way in registers.  What follows a contraction is done before the result
// leaves the chip: a bias, a sum, a ReLU, a pattern's mask, the way back through a max pool.
#pragma once
#include <type_traits>

#include "mma.cuh"
#include "step.h"

namespace gradkern::cuda {

// What lies behind a row of the source: places, or only channels.
enum class Source { kPlaces, kRows };

// Warps along the places and along the results, and tiles of 16 × 8 per warp.
template <int Down, int Across, int Mt, int Nt>
struct Shape {
  static constexpr int across = Across, MT = Mt, NT = Nt, BM = Down * Mt * 16, BN = Across * Nt * 8;
  static constexpr int ldm = BM + 8, ldn = BN + 8;  // lanes of a fragment then fall on 32 banks
  static_assert(Down * Across * kWarp == kStepThreads);
};
template <int Math>
using Wide = std::conditional_t<Math == kTf32x3, Shape<8, 1, 1, 8>, Shape<4, 2, 2, 4>>;  // what registers hold
using Narrow = Shape<8, 1, 1, 2>;

// Calls `go` with the shape and the source that the arguments ask for.
template <int Math, class Args, class Go>
auto with_shape(const Args& a, bool narrow, const Go& go) {
  if (a.linear)
    return narrow ? go.template operator()<Narrow, Source::kRows>()
                  : go.template operator()<Wide<Math>, Source::kRows>();
  return narrow ? go.template operator()<Narrow, Source::kPlaces>()
                : go.template operator()<Wide<Math>, Source::kPlaces>();
}

template <class T, class S>
constexpr int kStepShared = 2 * kSlice * (S::ldm + S::ldn) * static_cast<int>(sizeof(T));

// A row of the matrix: a place of a phase, of one row of the source.
struct Spot {
  int row, y, x;
  bool on;
};
GK_DEVICE Spot spot_of(int m, int total, int places, int width) {
  const bool on = m < total;
  const int at = on ? m : 0, row = at / places, q = at - row * places, y = q / width;
  return {row, y, q - y * width, on};
}

// ---- from memory to shared memory ------------------------------------------------------------------------------

// A thread's share of one slice.  Neighbouring threads take neighbouring places; of a linear layer, which has one
// place, neighbouring channels.
template <class T, class S, Source From>
struct Slice {
  static constexpr bool flat = From == Source::kRows;
  static constexpr int kEach = S::BM * kSlice / kStepThreads, kApart = kStepThreads / S::BM;
  static constexpr int kRows = flat ? kEach / 4 : 1;
  T x[kEach], w[4];
  const T* base[kRows];  // of the rows read, at the first channel of the group
  int y[kRows], xx[kRows];
  bool on[kRows];

  GK_DEVICE Slice(const StepArgs<T>& a, int group, int m0, int total, int places, int width) {
    const int tid = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Spot s = spot_of(m0 + (flat ? tid / 4 + i * (kStepThreads / 4) : tid % S::BM), total, places, width);
      base[i] = a.src + (static_cast<int64_t>(s.row) * a.groups + group) * a.K * (a.Hs * a.Ws);
      y[i] = s.y * a.step_h, xx[i] = s.x * a.step_w, on[i] = s.on;
    }
  }

  GK_DEVICE void fetch(const StepArgs<T>& a, int group, int n0, int tap, int c) {
    const int tid = threadIdx.x, HW = a.Hs * a.Ws;
    const int32_t* t = a.taps + 3 * tap;
    const int number = fixed(t + 2);
    if constexpr (flat) {
      const int k = c + tid % 4 * 4;
      const bool aligned = a.K % 4 == 0 && reinterpret_cast<uintptr_t>(a.src) % 16 == 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (on[i] && aligned && k < a.K) {
          const Four<T> four = fixed4(base[i] + k);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[4 * i + j] = four.v[j];
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) x[4 * i + j] = on[i] && k + j < a.K ? fixed(base[i] + k + j) : T(0);
        }
      }
    } else {
      const int h = y[0] + fixed(t), v = xx[0] + fixed(t + 1), k = c + tid / S::BM;
      const bool in = on[0] && h >= 0 && h < a.Hs && v >= 0 && v < a.Ws;
      const T* p = base[0] + (k * HW + h * a.Ws + v);
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[i] = in && k + i * kApart < a.K ? fixed(p + i * kApart * HW) : T(0);
    }
    const int k = c + tid / (S::BN / 4), n = n0 + tid % (S::BN / 4) * 4;
    const bool in = tid / (S::BN / 4) < kSlice && k < a.K && n < a.ldw;
    Four<T> four{};
    if (in) four = fixed4(a.weight + (static_cast<int64_t>(group * a.all_taps + number) * a.K + k) * a.ldw + n);
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = four.v[j];
  }

  GK_DEVICE void stash(T* xs, T* ws) const {
    const int tid = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = flat ? tid % 4 * 4 + i % 4 : tid / S::BM + i * kApart;
      const int m = flat ? tid / 4 + i / 4 * (kStepThreads / 4) : tid % S::BM;
      xs[k * S::ldm + m] = x[i];
    }
    const int k = tid / (S::BN / 4);
    if (k < kSlice) store4(ws + k * S::ldn + tid % (S::BN / 4) * 4, Four<T>{{w[0], w[1], w[2], w[3]}});
  }
};

// ---- the sums of a thread ----------------------------------------------------------------------------------------

// In T: neighbouring rows × four neighbouring columns.
template <class T, int Math, class S>
struct Sums {
  static constexpr int kRows = S::BM * S::BN / (4 * kStepThreads), kColumns = 4;
  T sum[kRows][4] = {};

  GK_DEVICE static int row(int r) { return static_cast<int>(threadIdx.x) / (S::BN / 4) * kRows + r; }
  GK_DEVICE static int column(int, int o) { return static_cast<int>(threadIdx.x) % (S::BN / 4) * 4 + o; }
  GK_DEVICE T at(int r, int o) const { return sum[r][o]; }

  GK_DEVICE void take(const T* xs, const T* ws) {
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
    for (int k = 0; k < kSlice; ++k) {
      T x[kRows];
      const T* from = xs + k * S::ldm + row(0);
      if constexpr (kRows % 4 == 0) {
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
          const Four<T> four = load4(from + r);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[r + j] = four.v[j];
        }
      } else {
#pragma unroll
        for (int r = 0; r < kRows; ++r) x[r] = from[r];
      }
      const Four<T> w = load4(ws + k * S::ldn + column(0, 0));
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int o = 0; o < 4; ++o) sum[r][o] += x[r] * w.v[o];
    }
  }
};

// On the tensor cores: the fragments of MT × NT tiles.
template <int Math, class S>
  requires(Math != kPlain)
struct Sums<float, Math, S> {
  static constexpr int kRows = S::MT * 2, kColumns = S::NT * 2;
  float sum[S::MT][S::NT][4] = {};

  GK_DEVICE static int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
  GK_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  GK_DEVICE static int row(int r) { return warp() / S::across * (S::MT * 16) + mma_row(lane(), r / 2, r % 2 * 2); }
  GK_DEVICE static int column(int, int o) {
    return warp() % S::across * (S::NT * 8) + mma_column(lane(), o / 2, o % 2);
  }
  GK_DEVICE float at(int r, int o) const { return sum[r / 2][o / 2][r % 2 * 2 + o % 2]; }

  // A lane's four of sixteen terms are t, t + 4, t + 8, t + 12.
  GK_DEVICE void take(const float* xs, const float* ws) {
    const int g = lane() / 4, t = lane() % 4;
    const float* x = xs + t * S::ldm + row(0);
    const float* w = ws + t * S::ldn + warp() % S::across * (S::NT * 8) + g;
    mma_sixteen<Math, S::MT, S::NT>(
        sum, [&](int m, int r, int j) { return x[4 * j * S::ldm + m * 16 + r * 8]; },
        [&](int n, int j) { return w[4 * j * S::ldn + n * 8]; });
  }
};

// ---- what follows ------------------------------------------------------------------------------------------------

// The result of one place and channel: everything behind the contraction, then out of the chip.
template <class T>
GK_DEVICE void put(const StepArgs<T>& a, int row, int kept, int y, int x, int channel, T value) {
  const int64_t channels = static_cast<int64_t>(a.groups) * a.O, HW = static_cast<int64_t>(a.H) * a.W;
  const int64_t place = static_cast<int64_t>(y) * a.W + x, at = (row * channels + channel) * HW + place;
  const int64_t seen = (kept * channels + channel) * HW + place;
  if (a.bias) value += fixed(a.bias + channel);
  if (a.add) value += fixed(a.add + at);
  if (a.relu && value <= T(0)) value = T(0);
  if (a.mask && fixed(a.mask + seen) <= T(0)) value = T(0);
  if (!a.choice) {
    a.out[at] = value;
    return;
  }
  const int chosen = fixed(a.choice + seen);
  T* to = a.out + ((row * channels + channel) * a.pool_H + static_cast<int64_t>(y) * a.pool_h) * a.pool_W +
          static_cast<int64_t>(x) * a.pool_w;
  for (int i = 0, tap = 0; i < a.pool_h; ++i)
    for (int j = 0; j < a.pool_w; ++j, ++tap) to[i * a.pool_W + j] = tap == chosen ? value : T(0);
}

template <class T, int Math, class S, Source From>
GK_DEVICE void run_step(const StepArgs<T>& a, unsigned char* memory) {
  const int group = blockIdx.z % a.groups;
  const int32_t* phase = a.phases + 6 * (blockIdx.z / a.groups);
  const int width = fixed(phase + 1), places = fixed(phase) * width, total = static_cast<int>(a.rows) * places;
  const int first = fixed(phase + 4), taps = fixed(phase + 5);
  const int across = (a.O + S::BN - 1) / S::BN;  // neighbouring blocks read the same rows
  const int n0 = blockIdx.x % across * S::BN, m0 = blockIdx.x / across * S::BM;
  if (m0 >= total) return;

  T* const arena = reinterpret_cast<T*>(memory);
  Sums<T, Math, S> sums;
  {
    Slice<T, S, From> slice(a, group, m0, total, places, width);
    constexpr int kStage = kSlice * (S::ldm + S::ldn);
    const int end = first + taps;
    if (taps) slice.fetch(a, group, n0, first, 0);
#pragma unroll 1
    for (int tap = first, c = 0, stage = 0; tap < end; stage = kStage - stage) {
      // The other buffer may still be read; this one is not, since all threads have been past the last barrier.
      T* xs = arena + stage;
      T* ws = xs + kSlice * S::ldm;
      slice.stash(xs, ws);
      __syncthreads();
      if ((c += kSlice) >= a.K) c = 0, ++tap;
      if (tap < end) slice.fetch(a, group, n0, tap, c);
      sums.take(xs, ws);
    }
  }
  const int y0 = fixed(phase + 2), x0 = fixed(phase + 3);
#pragma unroll
  for (int r = 0; r < sums.kRows; ++r) {
    const Spot s = spot_of(m0 + sums.row(r), total, places, width);
    if (!s.on) continue;
    const int kept = s.row / (a.seeds * a.inner) * a.inner + s.row % a.inner;
#pragma unroll
    for (int o = 0; o < sums.kColumns; ++o) {
      const int n = n0 + sums.column(r, o);
      if (n < a.O) put<T>(a, s.row, kept, y0 + s.y * a.out_h, x0 + s.x * a.out_w, group * a.O + n, sums.at(r, o));
    }
  }
}

template <class T, int Math, class S, Source From>
GK_KERNEL(kStepThreads, sizeof(T) == 4 ? 2 : 1)
step_kernel(const __grid_constant__ StepArgs<T> args) {
  GK_SHARED_ARENA(memory);
  run_step<T, Math, S, From>(args, memory);
}

}  // namespace gradkern::cuda
