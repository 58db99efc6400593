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

// Calls f(row, first element in the row, count) for the spans that a record works on: without an area, all rows.
template <class T, class F>
GK_INLINE void for_spans(const Context<T>& ctx, int64_t rows, int64_t count, const F& f) {
  if (!ctx.area) {
    for (int64_t h = 0; h < rows; ++h) f(h, int64_t(0), count);
    return;
  }
  const int32_t* span = ctx.area->items;
  for (int64_t k = 0; k < ctx.area->count; ++k, span += 3) f(int64_t(span[0]), int64_t(span[1]), int64_t(span[2]));
}

// Whether the cotangent that the current record reads can be nonzero in row h, or in column w.
template <class T>
GK_INLINE bool row_is_live(const Context<T>& ctx, int64_t h) {
  return !ctx.area || ctx.area->rows[h];
}
template <class T>
GK_INLINE bool column_is_live(const Context<T>& ctx, int64_t w) {
  return !ctx.area || ctx.area->columns[w];
}

// Seed s of the tile, counted from the seed that `targets`, `cotangents` and `results` point to: the tile's first seed
// or, if `order` names the seeds of the tile, the first seed of the call.
template <class T>
GK_INLINE int64_t seed_index(const Context<T>& ctx, int64_t s) {
  return ctx.order ? ctx.order[s] : s;
}

#include "body_ports.h"
#include "body_pattern.h"
#include "body_window.h"
#include "body_forms.h"
#include "body_matmul.h"

// A row of integers read as the record of kind R.
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
    case Kind::DenseT: return;  // only on a GPU
  }
}

// Zeroes what a record would have assigned.
template <class T>
void clear(const Place& dst, Context<T>& ctx, int64_t n, int64_t samples) {
  for (int64_t m = n; m < n + samples; ++m)
    for (int64_t s = 0; s < ctx.seeds; ++s)
      for_spans(ctx, 0, 0, [&](int64_t, int64_t first, int64_t count) {
        __builtin_memset(at(ctx, dst, m) + s * dst.seed + first, 0, count * sizeof(T));
      });
}

// Runs record `k` of the pass at the positions that the seeds reach.
template <class T>
void run_local(const Record* records, int64_t k, Context<T>& ctx, int64_t n) {
  const Record& record = records[k];
  ctx.area = ctx.areas && !ctx.areas[k].all ? ctx.areas + k : nullptr;
  if (!ctx.area || !ctx.area->skip) return run_record(record, ctx, n);
  const int64_t samples = record.whole_block ? ctx.samples : 1;
  if (record.kind == Kind::WindowT && as<WindowTRecord>(record).assign)
    clear(as<WindowTRecord>(record).dst, ctx, n, samples);
  if (record.kind == Kind::MatMulT && as<MatMulTRecord>(record).assign)
    clear(as<MatMulTRecord>(record).dst, ctx, n, samples);
}

// Runs of per-sample records are executed sample by sample, so that a sample's chain stays in L1.  Records of the whole
// block take all samples at once, so that a weight is read once per block.
template <class T>
void run_chain(const Record* records, int64_t count, Context<T>& ctx) {
  for (int64_t i = 0; i < count;) {
    if (records[i].whole_block) {
      run_local(records, i++, ctx, 0);
      continue;
    }
    int64_t end = i;
    while (end < count && !records[end].whole_block) ++end;
    for (int64_t n = 0; n < ctx.samples; ++n)
      for (int64_t k = i; k < end; ++k) run_local(records, k, ctx, n);
    i = end;
  }
}

}  // namespace
