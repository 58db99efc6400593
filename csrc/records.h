// Records of a chain as the kernels read them.  Plain data: no ATen, nothing of the standard library's.
//
// Written by `python -m gradkern.codegen.records_header` from gradkern/codegen/records.py
// and limits.py; not to be edited.
#pragma once
#include "record_parts.h"

namespace gradkern {

// Of everything here and in record_parts.h; gradkern compares it with its own when the extension is loaded.
constexpr char kRecordLayout[] = "2d68f4374556a496";
constexpr int kRecordWidth = 44;  // integers in a row

// clang-format off
#define GRADKERN_KINDS(X) \
  X(Load) X(Store) X(Window) X(PooledWindow) X(Stencil) X(Pattern) X(Elementwise) X(Add) X(Move) X(Multiply) \
  X(Lines) X(MatMul) X(Zero) X(Rectify) X(SeedRows) X(SeedOneHot) X(SeedDense) X(WindowT) X(ScatterT) X(DenseT) \
  X(StencilT) X(PatternT) X(ElementwiseT) X(Accumulate) X(MoveT) X(MultiplyT) X(LinesT) X(MatMulT) X(StoreT)
// clang-format on

enum class Kind : int64_t {
#define X(name) name,
  GRADKERN_KINDS(X)
#undef X
};

// Any record: a row of integers.
struct Record {
  Kind kind;
  int64_t whole_block;  // takes all samples of a block at once, so that its weight is read once for all of them
  int64_t samples;      // on a GPU: how many samples go together through the record's run
  int64_t fields[kRecordWidth - 3];
};

// An external input [C][H][W] → channels-last.
struct LoadRecord {
  Kind kind;
  int64_t whole_block, samples;
  int64_t input;  // which of the external inputs
  Place dst;
  Extent extent;
};

// A value → an external output [C][H][W].
struct StoreRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  int64_t output;  // which of the external outputs
  Extent extent;
};

// A convolution; or, over the whole block, a linear layer, whose positions are the samples.
//
// A window is `runs` contiguous pieces of `run_length` elements.  Each group's weights are [terms][O], the terms in
// the order of the window: on the CPU in tiles of output vectors (weights.py), on a GPU in rows of O rounded up to 4.
struct WindowRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;  // the start of the first window; row, position: from one window to the next
  Place dst;
  int64_t H;  // positions of the output
  int64_t W;
  int64_t C;  // channels read per group
  int64_t O;  // channels written per group
  int64_t groups;
  int64_t runs;  // per window
  int64_t run_length;
  int64_t run_table;  // offset of the runs' starts in the tables
  int64_t weights;    // offset in the packed weights
  int64_t bias;       // likewise
};

// On a GPU: a convolution joined with the ReLU or pool that reads it; `dst` is the pattern's output.
//
// The pool's windows neither overlap nor leave the input; H and W are positions of the pool's output.
struct PooledWindowRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;  // the start of the first window; row, position: from one window to the next
  Place dst;
  int64_t H;  // positions of the output
  int64_t W;
  int64_t C;  // channels read per group
  int64_t O;  // channels written per group
  int64_t groups;
  int64_t runs;  // per window
  int64_t run_length;
  int64_t run_table;  // offset of the runs' starts in the tables
  int64_t weights;    // offset in the packed weights
  int64_t bias;       // likewise
  PatternRef pattern;
  int64_t relu;
};

// A channelwise map over positions: y[q][c] = bias[c] + Σ_e x[q][e][c] · w[row_e][c].
struct StencilRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  int64_t C;  // channels
  StencilTable stencil;
  int64_t bias;  // offset in the packed weights
};

// A ReLU, a max pool, or both: the values and their bits.
struct PatternRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  Extent extent;  // of the output
  PatternRef pattern;
  int64_t relu;
};

// An elementwise function, and its derivative for the backward pass.
struct ElementwiseRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  Place slope;  // the derivative
  Extent extent;
  int64_t function;  // which of csrc/elementwise.h's functions
  double p0;         // its parameters
  double p1;
  double p2;
};

// The sum of two values.
struct AddRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place left;
  Place right;
  Place dst;
  Extent extent;
};

// Copies of strided runs.
struct MoveRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  int64_t runs;
  int64_t run_table;  // offset in the tables; 5 integers each: source, destination, count, and the steps of both
};

// The product of two values; a stride of 0 broadcasts a side along that axis.
struct MultiplyRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place left;
  Place right;
  Place dst;
  Extent extent;
  int64_t left_channel;  // stride between channels: 1, or 0 if one element serves all
  int64_t right_channel;
};

// Softmax, log-softmax or normalization.
struct LinesRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  LineSet lines;
};

// Products of matrices of values: left [rows][terms] · right [terms][columns], `matrices` of them per sample.
struct MatMulRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place left;            // row: from one matrix to the next; position: from one row to the next
  Place right;           // row: from one matrix to the next; position: from one term to the next
  Place dst;             // row: from one matrix to the next; position: from one row to the next
  int64_t left_term;     // stride between terms of the left side
  int64_t right_column;  // stride between columns of the right side; 1 on the CPU
  int64_t matrices;
  int64_t rows;
  int64_t columns;
  int64_t terms;
};

// Zeroes a buffer before something is added to it (a cotangent for all seeds), or to zero its border.
struct ZeroRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place dst;
  int64_t elements;
};

// A cotangent without its negative part, in place.
struct RectifyRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place dst;
  int64_t elements;
};

// The rows of the last weight that the targets choose: the first cotangent.
struct SeedRowsRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place dst;
  int64_t elements;
};

// A one at each seed's target.
struct SeedOneHotRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place dst;
  Extent extent;
};

// Adds the caller's cotangent of an output, [C][H][W].
struct SeedDenseRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place dst;
  int64_t cotangent;  // which of the external outputs
  Extent extent;
};

// On the CPU: a transposed convolution, or over the whole block a transposed linear layer.
struct WindowTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;             // the cotangent of the contraction's output, or of the pattern's output if there is a pattern
  int64_t seed_rows;     // the cotangent is the seed rows (the first gradient, which is free), not in scratch memory
  Place dst;             // the start of the first position's window; row, position: from one window to the next
  int64_t O;             // channels of the cotangent, all groups
  PatternRef pattern;    // the ReLU or pool through whose bits the cotangent is read
  int64_t weights;       // offset in the packed weights
  int64_t row_length;    // elements of a row of weights
  int64_t window_table;  // offset in the tables of the offsets of the window's elements
  int64_t H;             // positions of the cotangent
  int64_t W;
  int64_t C;  // channels of a window, per group
  int64_t groups;
  int64_t merged;          // the taps of the pool share one window, with one weight row per tap and channel
  int64_t window_vectors;  // pairs (offset, live lanes) in the window table
  int64_t sweep;           // positions per sweep over the weights
  int64_t assign;          // the first write of the destination: store instead of add
};

// On a GPU: a transposed convolution.
struct ScatterTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;             // the cotangent of the contraction's output, or of the pattern's output if there is a pattern
  int64_t seed_rows;     // the cotangent is the seed rows (the first gradient, which is free), not in scratch memory
  Place dst;             // the start of the first position's window; row, position: from one window to the next
  int64_t O;             // channels of the cotangent, all groups
  PatternRef pattern;    // the ReLU or pool through whose bits the cotangent is read
  int64_t weights;       // offset in the packed weights
  int64_t row_length;    // elements of a row of weights
  int64_t window_table;  // offset in the tables of the offsets of the window's elements
  int64_t H;             // positions of the cotangent
  int64_t W;
  int64_t C;  // channels of a window, per group
  int64_t groups;
  int64_t merged;           // the taps of the pool share one window
  int64_t window_elements;  // offsets in the window table
  ScatterAlgorithm algorithm;
  int64_t tap_table;  // Quads: offset in the tables of the starts of each tap's weights
  int64_t lanes;      // lanes of a worker
  Bands bands;
};

// On a GPU: a transposed linear layer, over the whole block.
struct DenseTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;             // the cotangent of the contraction's output, or of the pattern's output if there is a pattern
  int64_t seed_rows;     // the cotangent is the seed rows (the first gradient, which is free), not in scratch memory
  Place dst;             // the start of the first position's window; row, position: from one window to the next
  int64_t O;             // channels of the cotangent, all groups
  PatternRef pattern;    // the ReLU or pool through whose bits the cotangent is read
  int64_t weights;       // offset in the packed weights
  int64_t row_length;    // elements of a row of weights
  int64_t window_table;  // offset in the tables of the offsets of the window's elements
  int64_t window_elements;  // columns of the weight
  int64_t joined;           // the destination is one contiguous run
  int64_t assign;           // the first write of the destination: store instead of add
};

// The transposed channelwise map: y[q][c] += Σ_e x[q][e][c] · w[row_e][c].
struct StencilTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  int64_t C;  // channels
  StencilTable stencil;
};

// Adds a cotangent to the places that the pattern's bits select.
struct PatternTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  Extent extent;  // of the pattern's output
  PatternRef pattern;
};

// Multiplies a cotangent by the derivative.
struct ElementwiseTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  Place slope;
  Extent extent;
  int64_t assign;  // store (in place) instead of add
};

// Adds one cotangent to another.
struct AccumulateRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  Extent extent;
};

// Adds a cotangent to the elements that the runs of a move have read.
struct MoveTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  int64_t runs;
  int64_t run_table;  // the move's runs, with destinations and sources exchanged
  int64_t distinct;   // no element is read twice, so runs can be processed in parallel
};

// Adds a cotangent times the product's other side, summed where `dst` was broadcast.
struct MultiplyTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place other;
  Place dst;
  Extent extent;
  int64_t dst_channel;  // stride between channels: 1, or 0 if one element serves all
  int64_t other_channel;
};

// softmax: p ⊙ (g - ⟨g, p⟩);  log-softmax: g - p Σ g;  normalize: r (g - mean g - p mean(g p)).
struct LinesTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  Place dst;
  LineSet lines;
};

// The cotangent of one side for all seeds; one of left and right is a cotangent, the other a value.
struct MatMulTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place left;            // row: from one matrix to the next; position: from one row to the next
  Place right;           // row: from one matrix to the next; position: from one term to the next
  Place dst;             // row: from one matrix to the next; position: from one row to the next
  int64_t left_term;     // stride between terms of the left side
  int64_t right_column;  // stride between columns of the right side; 1 on the CPU
  int64_t matrices;
  int64_t rows;
  int64_t columns;
  int64_t terms;
  int64_t assign;  // the first write of the destination: store instead of add
};

// The cotangent of an input → the caller's [C][H][W].
struct StoreTRecord {
  Kind kind;
  int64_t whole_block, samples;
  Place src;
  int64_t result;  // which of the results
  Extent extent;
  int64_t fold;          // rows interleaved in the source, which then begins at its border (1: none)
  int64_t halo_rows;     // if rows are interleaved: rows of the border above
  int64_t halo_columns;  // and columns of the border on the left
};

constexpr int kMaxTaps = 256;     // taps of a pattern, each with a plane of bits
constexpr int kPorts = 16;        // external inputs of a chain, and external outputs
constexpr int kWalkElements = 5;  // elements of the window per lane
template <class T>
constexpr int kWalkSeeds = sizeof(T) == 4 ? 5 : 2;  // seeds per walk
template <class T>
constexpr int kQuads = sizeof(T) == 4 ? 6 : 3;  // quads of the window per lane: 2, 3, 5 or 6
constexpr int kQuadSeeds = 6;                   // seeds per visit
template <class T>
constexpr int kQuadSums = sizeof(T) == 4 ? 18 : 4;  // quads times seeds of a lane
constexpr int kQuadPlanes = 4;                      // taps of a pool that share a window
constexpr int kNarrow = 8;                          // the most elements of a narrow window
constexpr int kNarrowLanes = 4;                     // lanes of a worker
template <class T>
constexpr int kNarrowSeeds = sizeof(T) == 4 ? 5 : 3;  // seeds per visit
template <class T>
constexpr int kPooled = sizeof(T) == 4 ? 8 : 4;  // positions of a thread if a convolution is joined with its pool
constexpr int kPartRows = 12;  // the least rows of a linear layer's weight for each warp that shares a sum

}  // namespace gradkern
