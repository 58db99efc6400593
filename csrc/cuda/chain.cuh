// The chain kernel: persistent blocks, each taking tiles of samples through all records of a chain, forward and then
// backward for one tile of seeds after the other, with everything between the input and its gradient in shared memory.
#pragma once
#include "elementwise.cuh"
#include "forms.cuh"
#include "matmul.cuh"
#include "narrow.cuh"
#include "pooled.cuh"
#include "quads.cuh"
#include "scatter.cuh"
#include "window.cuh"

namespace gradkern::cuda {

template <class T>
GK_DEVICE void run_op(const Op& op, const Tile<T> t) {
  switch (static_cast<Kind>(op.kind)) {
    case Kind::Load: return run_load(op, t);
    case Kind::Window: return op.taps ? run_window_pooled(op, t) : run_window(op, t);
    case Kind::Stencil: return run_stencil<T, true>(op, t);
    case Kind::Pattern: return run_pattern(op, t);
    case Kind::Scale: return run_scale(op, t);
    case Kind::Sum: return run_sum(op, t);
    case Kind::Move: return run_move(op, t);
    case Kind::Product: return run_times(op, t);
    case Kind::Lines: return run_lines(op, t);
    case Kind::Store: return run_store(op, t);
    case Kind::SeedRows: return run_seed_rows(op, t);
    case Kind::SeedOneHot: return run_seed_onehot(op, t);
    case Kind::SeedDense: return run_seed_dense(op, t);
    case Kind::Zero: return run_zero(op, t);
    case Kind::WindowT: return run_window_t(op, t);
    case Kind::StencilT: return run_stencil<T, false>(op, t);
    case Kind::Expand: return run_expand(op, t);
    case Kind::MulD: return run_add<T, true>(op, t);
    case Kind::Add: return run_add<T, false>(op, t);
    case Kind::MoveT: return run_move_t(op, t);
    case Kind::ProductT: return run_times_t(op, t);
    case Kind::LinesT: return run_lines_t(op, t);
    case Kind::StoreT: return run_store_t(op, t);
    case Kind::Rectify: return run_rectify(op, t);
    case Kind::MatMul:
    case Kind::MatMulT: return run_matmul(op, t);
  }
}

// Block ops take all samples of the tile, so that a weight is read once for them; runs of other ops take `outer` at a
// time, as many as there are slots of scratch.
// What can be worked out again from the arguments is not kept: the records' functions want the registers.
template <class T>
GK_DEVICE void run_chain(const Args<T>& args, unsigned char* memory) {
  T* buf = reinterpret_cast<T*>(memory);
  Tile<T> t{args, buf, 0, 0, 0, 0, 0};
  for (t.tile = blockIdx.x; t.tile * static_cast<int64_t>(args.block) < args.samples; t.tile += gridDim.x) {
    // The forward pass, then one tile of seeds after the other.
    for (t.s0 = -args.seed_tile; t.s0 < (args.backward_count ? args.seeds : 0); t.s0 += args.seed_tile) {
      const bool forward = t.s0 < 0;
      t.seeds = forward ? 1 : args.seeds - t.s0 < args.seed_tile ? args.seeds - t.s0 : args.seed_tile;
      const Op* ops = forward ? args.forward : args.backward;
      const int count = forward ? args.forward_count : args.backward_count;
      for (int begin = 0, end; begin < count; begin = end) {
        const bool block = ops[begin].block;
        end = begin + 1;
        while (!block && end < count && !ops[end].block) ++end;
        const int step = block ? args.block : static_cast<int>(ops[begin].outer);
        for (t.first = 0; t.first < t.samples(); t.first += step) {
          t.count = t.samples() - t.first < step ? t.samples() - t.first : step;
          for (int k = begin; k < end; ++k) {
            run_op(ops[k], t);
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
  GK_SHARED_ARENA(memory);
  run_chain(args, memory);
}

}  // namespace gradkern::cuda
