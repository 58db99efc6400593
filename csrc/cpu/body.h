// The chain interpreter: one function per record kind (body_*.h), compiled once per ISA.
#include "simd.h"
#include "tiles.h"

namespace {

// A buffer of one sample: interior rows of `row` elements apart, W positions of C contiguous channels.
#define GK_SRC(n) (ctx.buf + op.src + (n) * op.src_n)
#define GK_DST(n) (ctx.buf + op.dst + (n) * op.dst_n)

#include "body_ports.h"
#include "body_pattern.h"
#include "body_window.h"
#include "body_forms.h"
#include "body_matmul.h"

#undef GK_SRC
#undef GK_DST

template <class T>
void run_op(const Op& op, Context<T>& ctx, int64_t n) {
  switch (static_cast<Kind>(op.kind)) {
    case Kind::Load: return run_load(op, ctx, n);
    case Kind::Window: return run_window(op, ctx, n);
    case Kind::Stencil: return run_stencil(op, ctx, n);
    case Kind::Pattern: return run_pattern(op, ctx, n);
    case Kind::Scale: return run_scale(op, ctx, n);
    case Kind::Sum: return run_sum(op, ctx, n);
    case Kind::Move: return run_move(op, ctx, n);
    case Kind::Product: return run_product(op, ctx, n);
    case Kind::Lines: return run_lines(op, ctx, n);
    case Kind::Store: return run_store(op, ctx, n);
    case Kind::SeedRows: return run_seed_rows(op, ctx, n);
    case Kind::SeedOneHot: return run_seed_onehot(op, ctx, n);
    case Kind::SeedDense: return run_seed_dense(op, ctx, n);
    case Kind::Zero: return run_zero(op, ctx, n);
    case Kind::WindowT: return run_window_t(op, ctx, n);
    case Kind::StencilT: return run_stencil_t(op, ctx, n);
    case Kind::Expand: return run_expand(op, ctx, n);
    case Kind::MulD: return run_mul_d(op, ctx, n);
    case Kind::Add: return run_add(op, ctx, n);
    case Kind::MoveT: return run_move_t(op, ctx, n);
    case Kind::ProductT: return run_product_t(op, ctx, n);
    case Kind::LinesT: return run_lines_t(op, ctx, n);
    case Kind::StoreT: return run_store_t(op, ctx, n);
    case Kind::Rectify: return run_rectify(op, ctx, n);
    case Kind::MatMul: return run_matmul(op, ctx, n);
    case Kind::MatMulT: return run_matmul_t(op, ctx, n);
  }
}

// Runs of per-sample ops go sample by sample, so that a sample's chain stays in L1; block ops go at once, so that
// a weight is read once per block.
template <class T>
void run_chain(const Op* ops, int64_t count, Context<T>& ctx) {
  for (int64_t i = 0; i < count;) {
    if (ops[i].block) {
      run_op(ops[i++], ctx, 0);
      continue;
    }
    int64_t end = i;
    while (end < count && !ops[end].block) ++end;
    for (int64_t n = 0; n < ctx.samples; ++n)
      for (int64_t k = i; k < end; ++k) run_op(ops[k], ctx, n);
    i = end;
  }
}

}  // namespace
