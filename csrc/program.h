// The native mirror of gradkern/codegen/chain.py: plain records, no ATen.
//
// A chain is two lists of `Op` records (forward, backward) over one scratch arena per thread.  The Python side
// decides every offset; this side only follows them.  All strides and offsets count elements, `bits*` count bytes.
#pragma once
#include <cstdint>

namespace gradkern {

// What a record does.  `…T` is the transposed action on the cotangents of all seeds.
// clang-format off
#define GRADKERN_OP_KINDS(X)                                                                                 \
  X(Load) X(Window) X(Stencil) X(Pattern) X(Scale) X(Sum) X(Move) X(Product) X(Lines) X(Store) X(SeedRows)     \
  X(SeedOneHot) X(SeedDense) X(Zero) X(WindowT) X(StencilT) X(Expand) X(MulD) X(Add) X(MoveT) X(ProductT)      \
  X(LinesT) X(StoreT) X(Rectify) X(MatMul) X(MatMulT)
// clang-format on

enum class Kind : int64_t {
#define X(name) name,
  GRADKERN_OP_KINDS(X)
#undef X
};

// One field list serves the struct, the names that Python checks itself against, and nothing else.
//
//   block          1: the op runs over all samples of the block at once (weights are read once per block)
//   src, dst       offset of the interior's first element in the scratch arena
//   *_n, *_s       stride between samples (0: the buffer is reused for each sample) and between seeds
//   *_row, *_px    stride between rows and between positions of the channels-last interior
//   H, W           positions that the op iterates over;  Hi, Wi: extent of the other side (bounds of a pool)
//   C, O           channels read, channels written (per group for Window)
//   K, R, L        contraction length, contiguous runs per window, elements per run (K = R·L)
//   slots          vectors per window in the backward weight layout; slot table at `table2`
//   rows           1: the cotangent comes from the seed rows (the first gradient, free) instead of `src`
//   assign         1: the first write of the destination: store instead of add
//   outer          segments per sweep over the weights (many where the weights do not fit L1)
//   merged         1: all taps of a pool share one window, with one weight row per tap and channel
//   fold           rows interleaved in the destination (1: none), so that a narrow window fills its vectors
// clang-format off
#define GRADKERN_OP_FIELDS(X)                                                                                \
  X(kind) X(block) X(src) X(src_n) X(src_s) X(src_row) X(src_px) X(aux) X(aux_n) X(aux_row) X(aux_px) X(dst) X(dst_n)  \
  X(dst_s) X(dst_row) X(dst_px) X(H) X(W) X(Hi) X(Wi) X(C) X(O) X(groups) X(K) X(R) X(L) X(slots) X(sh)      \
  X(sw) X(kh) X(kw) X(ph) X(pw) X(dh) X(dw) X(wf) X(bias) X(wb) X(ldw) X(table) X(table2) X(entries)         \
  X(bits) X(bits_n) X(nb) X(taps) X(relu) X(fn) X(p0) X(p1) X(p2) X(ext) X(rows) X(assign) X(outer) X(merged) X(fold) X(size)
// clang-format on

struct Op {
#define X(name) int64_t name;
  GRADKERN_OP_FIELDS(X)
#undef X
};

// A run of live channels: dst window += Σ_c g[src + c] · W[c].
struct Segment {
  int64_t src, dst;
  int64_t start, count;  // into the index list
};

// Everything a kernel needs for one block of samples on one thread.
template <class T>
struct Context {
  T* buf;          // scratch arena: shared part, then one record per sample
  uint8_t* bits;   // bit patterns, same order
  uint16_t* idx;   // live channels of the op at hand
  uint16_t* rows;  // their weight rows, where those are not the channels themselves
  Segment* segs;
  const T* packed;  // folded weights
  const int32_t* tables;
  const T* const* inputs;  // per external input: first sample of the block
  const int64_t* input_n;  // elements per sample
  T* const* outputs;       // forward results, likewise
  const int64_t* output_n;
  const T* const* cotangents;  // dense seeds [n][S][size], likewise, at the first seed of the tile
  T* const* results;           // Jacobians [n][S][size], likewise
  const int64_t* targets;      // flat output index per seed; [S] or [n][S]
  int64_t target_n;            // 0 where all samples share them
  const T* seed_rows;          // rows of the last weight, [S][ldw] or [n][S][ldw]
  int64_t seed_rows_n, seed_rows_s;
  int64_t seeds_total;  // S of the whole call: stride of cotangents and results
  int64_t seeds;        // seeds of this tile
  int64_t samples;      // samples of this block
};

// A max pool over planes [H][W] (a 1-D one has H = 1).
struct Pool {
  int64_t H, W, kh, kw, sh, sw, ph, pw, dh, dw, oh, ow;
};

// DeepLift's multipliers of a ReLU, a max pool, or the one behind the other.
template <class T>
struct SharesArgs {
  const T* z;        // [N][C][H][W]
  const T* ref;      // [N or 1][C][H][W]
  T* out;            // [taps][N][C][oh][ow], or [N][C][H][W] without a pool
  T* scratch;        // of a CPU thread: 4 ow + 2 taps ow
  int64_t ref_rows;  // 1 where one reference serves all samples
  int64_t channels;
  int64_t out_tap;
  Pool pool;
  bool relu;
  T eps;
};

// What one ISA's translation unit offers.
template <class T>
struct Kernels {
  void (*run)(const Op* ops, int64_t count, Context<T>& context);
  void (*shares)(const SharesArgs<T>& args, int64_t begin, int64_t end);  // rows n·C + c
  void (*secant)(const SharesArgs<T>& args, int64_t begin, int64_t end);
};

struct Isa {
  const char* name;
  int vector_bytes;
  bool (*supported)();
  Kernels<float> f32;
  Kernels<double> f64;
};

}  // namespace gradkern
