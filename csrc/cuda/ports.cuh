// Records that read or write the caller's tensors: inputs, outputs, seeds and results.
#pragma once
#include "tile.cuh"

namespace gradkern::cuda {

// [C][H][W] of the caller → channels-last interior.
template <class T>
GK_RECORD void run_load(const LoadRecord& op, const Tile<T> t) {
  const Order order(op.extent);
  const Steps dst(op.dst);
  const T* x = t.args.inputs[op.input] + t.sample(0) * order.size;
  const Divider samples(order.size);
  for (int i = t.tid(); i < t.count * order.size; i += t.threads()) {
    const auto [m, e] = samples.parts(i);
    const Element p = order.of(e);
    t.at(op.dst, m)[dst(p.h, p.w) + p.c] = fixed(x + i);
  }
}

template <class T>
GK_RECORD void run_store(const StoreRecord& op, const Tile<T> t) {
  const Order order(op.extent);
  const Steps src(op.src);
  T* y = t.args.outputs[op.output] + t.sample(0) * order.size;
  const Divider samples(order.size);
  for (int i = t.tid(); i < t.count * order.size; i += t.threads()) {
    const auto [m, e] = samples.parts(i);
    const Element p = order.of(e);
    y[i] = t.at(op.src, m)[src(p.h, p.w) + p.c];
  }
}

// The cotangent of an input → the caller's [N][S][C][H][W], in 16-byte stores if that is aligned.  It is inlined,
// because a separate function would have to save a few registers.
template <class T>
GK_DEVICE void run_store_t(const StoreTRecord& op, const Tile<T> t) {
  constexpr int kPiece = 16 / sizeof(T);
  const int H = op.extent.H, W = op.extent.W;
  const Order order(op.extent);
  const Steps src(op.src);
  T* y = t.args.results[op.result];
  const int piece = order.size % kPiece == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0 ? kPiece : 1;
  const int size = order.size, each = size / piece;
  const Divider copies(each), seeds(t.seeds);
  for (int i = t.tid(); i < t.count * t.seeds * each; i += t.threads()) {
    const auto [ms, rest] = copies.parts(i);
    const auto [m, s] = seeds.parts(ms);
    const int e = rest * piece;
    const T* g = t.at(op.src, m, s);
    T* out = y + (t.sample(m) * t.args.seeds + t.s0 + s) * size + e;
    Element p = order.of(e);
    T numbers[kPiece];
#pragma unroll
    for (int k = 0; k < kPiece; ++k) {
      if (k >= piece) break;
      numbers[k] = g[src(p.h, p.w) + p.c];
      if (++p.w == W) {
        p.w = 0;
        if (++p.h == H) p.h = 0, ++p.c;
      }
    }
    if (piece == 1) {
      out[0] = numbers[0];
    } else if constexpr (sizeof(T) == 4) {
      store4(out, Four<T>{{numbers[0], numbers[1], numbers[2], numbers[3]}});
    } else {
      *reinterpret_cast<double2*>(out) = make_double2(numbers[0], numbers[1]);
    }
  }
}

// The rows of the last weight, copied if they are not consumed directly.
template <class T>
GK_RECORD void run_seed_rows(const SeedRowsRecord& op, const Tile<T> t) {
  const int size = op.elements, seed = op.dst.seed;
  const Divider copies(size), seeds(t.seeds);
  for (int i = t.tid(); i < t.count * t.seeds * size; i += t.threads()) {
    const auto [ms, e] = copies.parts(i);
    const auto [m, s] = seeds.parts(ms);
    t.at(op.dst, m)[s * seed + e] =
        fixed(t.args.seed_rows + t.sample(m) * t.args.seed_rows_n + (t.s0 + s) * t.args.seed_rows_s + e);
  }
}

template <class T>
GK_RECORD void run_seed_onehot(const SeedOneHotRecord& op, const Tile<T> t) {
  const Order order(op.extent);
  for (int i = t.tid(); i < t.count * t.seeds; i += t.threads()) {
    const int m = i / t.seeds, s = i - m * t.seeds;
    const Element p = order.of(static_cast<int>(fixed(t.args.targets + t.sample(m) * t.args.target_n + t.s0 + s)));
    t.at(op.dst, m, s)[Steps(op.dst)(p.h, p.w) + p.c] = T(1);
  }
}

template <class T>
GK_RECORD void run_seed_dense(const SeedDenseRecord& op, const Tile<T> t) {
  const int seed = op.dst.seed;
  const Order order(op.extent);
  const Steps dst(op.dst);
  const Divider copies(order.size), seeds(t.seeds);
  for (int i = t.tid(); i < t.count * t.seeds * order.size; i += t.threads()) {
    const auto [ms, e] = copies.parts(i);
    const auto [m, s] = seeds.parts(ms);
    const Element p = order.of(e);
    t.at(op.dst, m)[s * seed + dst(p.h, p.w) + p.c] +=
        fixed(t.args.cotangents[op.cotangent] + (t.sample(m) * t.args.seeds + t.s0 + s) * order.size + e);
  }
}

}  // namespace gradkern::cuda
