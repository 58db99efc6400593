// The chain kernel: persistent blocks, each taking tiles of samples through all records of a chain, forward and then
// backward for one tile of seeds after the other, with everything between the input and its gradient in shared memory.
#pragma once
#include "forms.cuh"
#include "matmul.cuh"
#include "narrow.cuh"
#include "pattern.cuh"
#include "pooled.cuh"
#include "ports.cuh"
#include "quads.cuh"
#include "scatter.cuh"
#include "window.cuh"

namespace gradkern::cuda {

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
