// The arguments of the CPU's kernels.
#pragma once
#include <utility>

#include "../records.h"
#include "../rescale_rule.h"

namespace gradkern {

// A run of live channels: dst window += Σ_c g[src + c] · W[c].
struct Segment {
  int64_t src, dst;
  int64_t start, count;  // into the lists of live channels
};

// The part of a record of the backward pass that runs if the seeds are local (local.h), where most cotangents are zero.
struct Area {
  bool all;   // the whole record runs, as if the seeds were not local
  bool skip;  // nothing runs, as no cotangent arrives; a destination that would have been assigned is zeroed instead
  const uint8_t *rows, *columns;  // flags: the cotangent that is read can be nonzero in this row, in this column
  const int32_t* items;           // spans of elements (row, first in the row, count), or the needed part of a table
  int64_t count;
};

// Everything a kernel needs for one block of samples on one thread.
template <class T>
struct Context {
  T* buf;                 // scratch memory: the shared part, then a part per sample
  uint8_t* bits;          // bits of patterns: a part per sample
  int64_t bits_sample;    // bytes of that part
  uint16_t* channels;     // live channels of the current record
  uint16_t* weight_rows;  // the weight rows of these channels, if they differ from the channels
  Segment* segments;
  const T* packed;  // folded weights
  const int32_t* tables;
  const T* const* inputs;  // per external input: its tensor from the block's first sample on
  const int64_t* input_n;  // per external input: elements per sample
  T* const* outputs;       // per external output, likewise; null if another thread stores them
  const int64_t* output_n;
  const T* const* cotangents;  // per external output: dense seeds [n][S][size] from the tile's first seed on
  T* const* results;           // per wanted input: Jacobians [n][S][size], likewise
  const int64_t* targets;      // flat output index per seed; [S] or [n][S]
  int64_t target_n;            // targets per sample; 0 if all samples share them
  const T* seed_rows;          // rows of the last weight, [S][row] or [n][S][row]
  int64_t seed_rows_n, seed_rows_s;
  int64_t seeds_total;   // S of the whole call: stride of cotangents and results
  int64_t seeds;         // seeds of this tile that this thread processes
  int64_t tile_seeds;    // seeds of the whole tile
  int64_t tile_first;    // the first of this thread's seeds, counted in the tile
  int64_t samples;       // samples of this block
  const int64_t* order;  // if seeds are local: the numbers of this tile's seeds in the call; null: consecutive seeds
  const Area* areas;     // if seeds are local: the areas of all records of the pass
  const Area* area;      // the area of the current record; null: the whole record runs
};

// Names in this order are the codes of recurrent layers (gradkern/runtime/recurrent.py has the same).
enum class Cell : int64_t { Tanh, Relu, Gru, Lstm };

// One recurrent layer in one direction.  The gates come from rows of inputs, the state one step earlier and a one (for
// the biases).  A GRU has four: its last gate counts twice, on the side of the input and on that of the state.
template <class T>
struct RecurrentArgs {
  Cell cell;
  bool reverse;  // the layer reads from the last step to the first
  bool add;      // to `result`
  bool finite;   // all weights are
  const T* x;    // [n][T][inputs] with these strides
  int64_t x_n, x_t;
  T* y;  // states, [n][T][H]
  int64_t y_n, y_t;
  const T* g;  // cotangents of the states, [n][S][T][H]
  int64_t g_n, g_s, g_t;
  const T* weight;    // [inputs + H + 1][columns] in panels: to the gates
  const T* weight_t;  // [gates · H][row] in panels: from the gates' cotangents to those of the state and of the input
  T* result;          // [n][S][T][inputs]
  T* scratch;
  int64_t seeds, steps, hidden, inputs, gates, columns, row;

  int64_t width() const { return inputs + hidden + 1; }
  bool gated() const { return cell == Cell::Gru || cell == Cell::Lstm; }
  // Numbers of scratch memory per sample.
  int64_t forward_scratch() const { return width() + columns + hidden; }
  int64_t step_scratch() const { return columns + 2 * hidden + (gated() ? width() : 0); }
  int64_t seed_scratch() const { return (gates + 1) * hidden + row; }
};

constexpr int64_t kPanel = 16;  // columns of a panel of a recurrent layer's weight, a multiple of every vector

// Rows of numbers, and the statistics over samples that they are added to: in double, and sample after sample, so that
// the result depends neither on the threads nor on how samples were divided into calls.
template <class T>
struct StatisticsArgs {
  const T* rows;  // [samples][size]
  int64_t samples, size;
  const uint8_t* keep;  // the samples that count; null: all
  bool magnitude;       // `sum` is of the absolute values
  double *sum, *square, *abs;
  float* max;             // of absolute values
  double* group;          // [groups][group_stride] sums of absolute values; any statistic may be null
  const int64_t* groups;  // [samples]
  int64_t group_stride;
};

// The functions of one ISA's translation unit.
template <class T>
struct Kernels {
  void (*run)(const Record* records, int64_t count, Context<T>& context);
  void (*rescale)(const RescaleArgs<T>& args, int64_t begin, int64_t end);  // rows n·C + c
  void (*secant)(const RescaleArgs<T>& args, int64_t begin, int64_t end);
  void (*recurrent)(const RecurrentArgs<T>& args, int64_t begin, int64_t end);      // samples
  void (*recurrent_vjp)(const RecurrentArgs<T>& args, int64_t begin, int64_t end);  // samples
  void (*add_rows)(const StatisticsArgs<T>& args, int64_t begin, int64_t end);      // elements
  bool (*all_finite)(const T* numbers, int64_t count);
  int seed_block;  // the most seeds in registers at a time; a tile is cut evenly into blocks of at most that many
};

struct ByteRange {
  const void* data;
  size_t size;  // in bytes
};

struct Isa {
  const char* name;
  int vector_bytes;
  int tile_vectors;  // the most vectors of output channels in a tile of packed forward weights
  bool (*supported)();
  uint64_t (*hash)(uint64_t total, const ByteRange* ranges, size_t count);  // order-sensitive, continues `total`
  Kernels<float> f32;
  Kernels<double> f64;
};

}  // namespace gradkern
