// The chain kernel: persistent blocks, each taking tiles of samples through all records of a chain, forward and then
// backward for one tile of seeds after the other, with everything between the input and its gradient in shared memory.
#pragma once
#include <cmath>

#include "forms.cuh"
#include "matmul.cuh"
#include "pattern.cuh"
#include "quads.cuh"
#include "window.cuh"

namespace gradkern::cuda {

// Records that read or write the caller's tensors: inputs, outputs, seeds and results.

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

// Calls check their targets on the host.  One that reaches the GPU unchecked and names no output gives NaN, since a
// kernel can raise no error, and the place that it names may be anywhere.
template <class T>
GK_RECORD void run_seed_onehot(const SeedOneHotRecord& op, const Tile<T> t) {
  const Order order(op.extent);
  for (int i = t.tid(); i < t.count * t.seeds; i += t.threads()) {
    const int m = i / t.seeds, s = i - m * t.seeds;
    const int64_t target = fixed(t.args.targets + t.sample(m) * t.args.target_n + t.s0 + s);
    const bool known = target >= 0 && target < order.size;
    const Element p = order.of(known ? static_cast<int>(target) : 0);
    t.at(op.dst, m, s)[Steps(op.dst)(p.h, p.w) + p.c] = known ? T(1) : T(NAN);
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

template <class T>
GK_DEVICE void run_record(const Record& record, const Tile<T> t) {
  switch (record.kind) {
    case Kind::Load: return run_load(as<LoadRecord>(record), t);
    case Kind::Store: return run_store(as<StoreRecord>(record), t);
    case Kind::Window: return run_window(as<WindowRecord>(record), t);
    case Kind::PooledWindow: return run_window_pooled(as<PooledWindowRecord>(record), t);
    case Kind::Stencil: return run_stencil(as<StencilRecord>(record), t);
    case Kind::Pattern: return run_pattern(as<PatternRecord>(record), t);
    case Kind::Elementwise: return run_elementwise(as<ElementwiseRecord>(record), t);
    case Kind::Add: return run_add(as<AddRecord>(record), t);
    case Kind::Move: return run_move(as<MoveRecord>(record), t);
    case Kind::Multiply: return run_multiply(as<MultiplyRecord>(record), t);
    case Kind::Lines: return run_lines(as<LinesRecord>(record), t);
    case Kind::Zero: return run_zero(as<ZeroRecord>(record), t);
    case Kind::Rectify: return run_rectify(as<RectifyRecord>(record), t);
    case Kind::SeedRows: return run_seed_rows(as<SeedRowsRecord>(record), t);
    case Kind::SeedOneHot: return run_seed_onehot(as<SeedOneHotRecord>(record), t);
    case Kind::SeedDense: return run_seed_dense(as<SeedDenseRecord>(record), t);
    case Kind::ScatterT: return run_scatter(as<ScatterTRecord>(record), t);
    case Kind::DenseT: return run_dense_t(as<DenseTRecord>(record), t);
    case Kind::StencilT: return run_stencil_t(as<StencilTRecord>(record), t);
    case Kind::PatternT: return run_pattern_t(as<PatternTRecord>(record), t);
    case Kind::ElementwiseT: return run_elementwise_t(as<ElementwiseTRecord>(record), t);
    case Kind::Accumulate: return run_accumulate(as<AccumulateRecord>(record), t);
    case Kind::MoveT: return run_move_t(as<MoveTRecord>(record), t);
    case Kind::MultiplyT: return run_multiply_t(as<MultiplyTRecord>(record), t);
    case Kind::LinesT: return run_lines_t(as<LinesTRecord>(record), t);
    case Kind::MatMul:
    case Kind::MatMulT: return run_matmul(record, t);
    case Kind::StoreT: return run_store_t(as<StoreTRecord>(record), t);
    case Kind::WindowT: return;  // the CPU's
  }
}

// Records of the whole block take all samples of the tile, so that a weight is read once for them; runs of other
// records take `samples` at a time, as many as scratch has room for. Values that can be recomputed from the arguments
// are not kept: the records' functions need the registers.
template <class T>
GK_DEVICE void run_chain(const Args<T>& args, unsigned char* memory) {
  T* buf = reinterpret_cast<T*>(memory);
  Tile<T> t{args, buf, 0, 0, 0, 0, 0};
  for (t.tile = blockIdx.x; t.tile * static_cast<int64_t>(args.block) < args.samples; t.tile += gridDim.x) {
    // The forward pass, then one tile of seeds after the other.
    for (t.s0 = -args.seed_tile; t.s0 < (args.backward_count ? args.seeds : 0); t.s0 += args.seed_tile) {
      const bool forward = t.s0 < 0;
      t.seeds = forward ? 1 : args.seeds - t.s0 < args.seed_tile ? args.seeds - t.s0 : args.seed_tile;
      const Record* records = forward ? args.forward : args.backward;
      const int count = forward ? args.forward_count : args.backward_count;
      for (int begin = 0, end; begin < count; begin = end) {
        const bool whole_block = records[begin].whole_block;
        end = begin + 1;
        while (!whole_block && end < count && !records[end].whole_block) ++end;
        const int step = whole_block ? args.block : static_cast<int>(records[begin].samples);
        for (t.first = 0; t.first < t.samples(); t.first += step) {
          t.count = t.samples() - t.first < step ? t.samples() - t.first : step;
          for (int k = begin; k < end; ++k) {
            run_record(records[k], t);
            __syncthreads();
          }
        }
      }
    }
  }
}

template <class T>
GK_KERNEL(kThreads, 1)
chain_kernel(const __grid_constant__ Args<T> args) {
  GK_SHARED_MEMORY(memory);
  run_chain(args, memory);
}

}  // namespace gradkern::cuda
