// What records are made of, and the memory that a chain of them needs.
//
// Written by `python -m gradkern.codegen.records_header` from gradkern/codegen/records.py
// and limits.py; not to be edited.
#pragma once
#include <cstdint>

namespace gradkern {

// The axis of the storage along which lines run.
enum class Along : int64_t {
  Channels = 0,
  Columns = 1,
  Rows = 2,
};

// The function that is applied to each line.
enum class LineFunction : int64_t {
  Softmax = 0,
  LogSoftmax = 1,
  Normalize = 2,
};

// How a GPU's workers compute a transposed convolution.
enum class ScatterAlgorithm : int64_t {
  Walk = 0,    // live channel by live channel (csrc/cuda/scatter.cuh)
  Quads = 1,   // all channels, four elements of the window at a time (csrc/cuda/quads.cuh)
  Narrow = 2,  // narrow windows, four lanes for the channels (csrc/cuda/quads.cuh)
};

// Which positions of its destination a record of the backward pass reaches from those of its source.
enum class Reach : int64_t {
  Nothing = 0,  // none: the record has only one cotangent
  All = 1,      // all positions
  Same = 2,
  Taps = 3,    // those of windows, by rows and by columns: a step, the number of offsets, the offsets
  Ranges = 4,  // a range (first, end) for each row and each column of the source
  Moves = 5,   // where the move's runs go
};

// Where the channels-last interior of a value or cotangent begins in scratch memory.
struct Place {
  int64_t offset;  // of the first element, of the first sample and seed
  int64_t sample;  // stride between samples; 0: samples share the memory; < 0, on a GPU: minus that of current samples
  int64_t seed;    // stride between seeds; 0: no cotangent
  int64_t row;     // elements from one row of positions to the next
  int64_t position;  // elements from one position to the next
};

// Channels, rows and columns.
struct Extent {
  int64_t C;
  int64_t H;
  int64_t W;
};

// Bits of a ReLU, a max pool, or both, and the geometry of the pool (a kernel of 1 for a bare ReLU).
//
// Every position of the output has `taps` planes of bits with one bit per channel. A bit is set in the plane of the
// tap that the output came from, if the output is alive.
struct PatternRef {
  int64_t bits;         // byte offset among a sample's bits
  int64_t taps;         // planes per position; 0: no pattern
  int64_t plane_bytes;  // bytes of one plane: a bit per channel, in whole 16-bit words
  int64_t H;            // rows of the pool's input
  int64_t W;            // columns of the pool's input
  int64_t kh;           // kernel
  int64_t kw;
  int64_t sh;  // stride
  int64_t sw;
  int64_t ph;  // padding before
  int64_t pw;
  int64_t dh;  // dilation
  int64_t dw;
};

// Blocks of positions with the same reads; tables.py defines blocks and entries.
struct StencilTable {
  int64_t weights;      // offset in the packed weights: rows of one weight per channel
  int64_t row_length;   // elements of a row of weights
  int64_t blocks;       // the number of blocks
  int64_t block_table;  // offset of the blocks in the tables, 7 integers each
  int64_t entry_table;  // offset of the entries in the tables, 2 integers each
};

// Softmax or normalization along one axis of the storage, and the values saved for the backward pass.
struct LineSet {
  Extent extent;
  Along along;
  LineFunction function;
  double epsilon;      // added to the variance
  Place saved;         // the probabilities, or the normalized values
  int64_t deviations;  // elements from `saved` to the lines' inverse standard deviations
};

// Rectangles of positions that a GPU's workers own; rectangles of one colour touch different memory.
struct Bands {
  int64_t rows;  // of positions in a band
  int64_t columns;
  int64_t row_colours;
  int64_t column_colours;
};

// Scratch memory of one thread.
struct CpuSizes {
  int64_t shared;    // elements that all samples share
  int64_t sample;    // elements of each sample
  int64_t bits;      // bytes of each sample's bits
  int64_t entries;   // of the lists of live channels
  int64_t segments;  // of those lists
  int64_t block;     // samples that are processed together
  int64_t local;     // offset in the tables of the table of local seeds, plus one; 0: seeds are not local
};

// Shared memory of one thread block.
struct CudaSizes {
  int64_t workspace;  // elements that a few samples at a time share
  int64_t sample;     // elements of each sample
  int64_t bits;       // bytes of each sample's bits
  int64_t samples;    // the most in the workspace at a time
  int64_t bytes;      // of shared memory in all
  int64_t block;      // samples of a block
};

}  // namespace gradkern
