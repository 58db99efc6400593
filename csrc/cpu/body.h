// The chain interpreter: one function per record kind (body_*.h), compiled once per ISA.
// docs/architecture.md says what the letters of loops and operands stand for.
#include "simd.h"
#include "tiles.h"

namespace {

// Sample n's part of a place.
template <class T>
GK_INLINE T* at(const Context<T>& ctx, const Place& place, int64_t n) {
  return ctx.buf + place.offset + n * place.sample;
}

#include "body_ports.h"
#include "body_pattern.h"
#include "body_window.h"
#include "body_forms.h"
#include "body_matmul.h"

// A row of integers as the record of its kind.
template <class R>
GK_INLINE const R& as(const Record& record) {
  static_assert(sizeof(R) <= sizeof(Record));
  return reinterpret_cast<const R&>(record);
}

template <class T>
void run_record(const Record& record, Context<T>& ctx, int64_t n) {
  switch (record.kind) {
    case Kind::Load: return run_load(as<LoadRecord>(record), ctx, n);
    case Kind::Store: return run_store(as<StoreRecord>(record), ctx, n);
    case Kind::Window: return run_window(as<WindowRecord>(record), ctx, n);
    case Kind::Stencil: return run_stencil(as<StencilRecord>(record), ctx, n);
    case Kind::Pattern: return run_pattern(as<PatternRecord>(record), ctx, n);
    case Kind::Elementwise: return run_elementwise(as<ElementwiseRecord>(record), ctx, n);
    case Kind::Add: return run_add(as<AddRecord>(record), ctx, n);
    case Kind::Move: return run_move(as<MoveRecord>(record), ctx, n);
    case Kind::Multiply: return run_multiply(as<MultiplyRecord>(record), ctx, n);
    case Kind::Lines: return run_lines(as<LinesRecord>(record), ctx, n);
    case Kind::MatMul: return run_matmul(as<MatMulRecord>(record), ctx, n);
    case Kind::Zero: return run_zero(as<ZeroRecord>(record), ctx, n);
    case Kind::Rectify: return run_rectify(as<RectifyRecord>(record), ctx, n);
    case Kind::SeedRows: return run_seed_rows(as<SeedRowsRecord>(record), ctx, n);
    case Kind::SeedOneHot: return run_seed_onehot(as<SeedOneHotRecord>(record), ctx, n);
    case Kind::SeedDense: return run_seed_dense(as<SeedDenseRecord>(record), ctx, n);
    case Kind::WindowT: return run_window_t(as<WindowTRecord>(record), ctx, n);
    case Kind::StencilT: return run_stencil_t(as<StencilTRecord>(record), ctx, n);
    case Kind::PatternT: return run_pattern_t(as<PatternTRecord>(record), ctx, n);
    case Kind::ElementwiseT: return run_elementwise_t(as<ElementwiseTRecord>(record), ctx, n);
    case Kind::Accumulate: return run_accumulate(as<AccumulateRecord>(record), ctx, n);
    case Kind::MoveT: return run_move_t(as<MoveTRecord>(record), ctx, n);
    case Kind::MultiplyT: return run_multiply_t(as<MultiplyTRecord>(record), ctx, n);
    case Kind::LinesT: return run_lines_t(as<LinesTRecord>(record), ctx, n);
    case Kind::MatMulT: return run_matmul_t(as<MatMulTRecord>(record), ctx, n);
    case Kind::StoreT: return run_store_t(as<StoreTRecord>(record), ctx, n);
    case Kind::PooledWindow:
    case Kind::ScatterT:
    case Kind::DenseT: return;  // a GPU's
  }
}

// Runs of per-sample records are executed sample by sample, so that a sample's chain stays in L1.  Records of the whole
// block take all samples at once, so that a weight is read once per block.
template <class T>
void run_chain(const Record* records, int64_t count, Context<T>& ctx) {
  for (int64_t i = 0; i < count;) {
    if (records[i].whole_block) {
      run_record(records[i++], ctx, 0);
      continue;
    }
    int64_t end = i;
    while (end < count && !records[end].whole_block) ++end;
    for (int64_t n = 0; n < ctx.samples; ++n)
      for (int64_t k = i; k < end; ++k) run_record(records[k], ctx, n);
    i = end;
  }
}

}  // namespace
