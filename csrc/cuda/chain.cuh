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
GK_RECORD void run(const LoadRecord& op, const Tile<T> t) {
  const Order order(op.extent);
  const T* x = t.args.inputs[op.input] + t.sample(0) * order.size;
  over_copies(t, 1, order.size, [&](int m, int s, int e) {
    const Element p = order.of(e);
    t.at(op.dst, m, s, p.h, p.w)[p.c] = fixed(x + m * order.size + e);
  });
}

template <class T>
GK_RECORD void run(const StoreRecord& op, const Tile<T> t) {
  const Order order(op.extent);
  T* y = t.args.outputs[op.output] + t.sample(0) * order.size;
  over_copies(t, 1, order.size, [&](int m, int s, int e) {
    const Element p = order.of(e);
    y[m * order.size + e] = t.at(op.src, m, s, p.h, p.w)[p.c];
  });
}

// The cotangent of an input → the caller's [N][S][C][H][W], in 16-byte stores if that is aligned.  It is inlined,
// because a separate function would have to save a few registers.
template <class T>
GK_DEVICE void run(const StoreTRecord& op, const Tile<T> t) {
  const int H = op.extent.H, W = op.extent.W;
  const Order order(op.extent);
  const Steps src(op.src);
  T* y = t.args.results[op.result];
  const int piece = order.size % 4 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0 ? 4 : 1;
  over_copies(t, t.seeds, order.size / piece, [&](int m, int s, int number) {
    const int e = number * piece;
    const T* g = t.at(op.src, m, s);
    Element p = order.of(e);
    Four<T> numbers{};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k >= piece) break;
      numbers.v[k] = g[src(p.h, p.w) + p.c];
      if (++p.w == W) {
        p.w = 0;
        if (++p.h == H) p.h = 0, ++p.c;
      }
    }
    store_some(y + (t.sample(m) * t.args.seeds + t.s0 + s) * order.size + e, numbers, piece, piece == 4);
  });
}

// The rows of the last weight, copied if they are not consumed directly.
template <class T>
GK_RECORD void run(const SeedRowsRecord& op, const Tile<T> t) {
  over_copies(t, t.seeds, op.elements,
              [&](int m, int s, int e) { t.at(op.dst, m, s)[e] = fixed(t.seed_row(m, s) + e); });
}

// Calls check their targets on the host.  One that reaches the GPU unchecked and names no output gives NaN, since a
// kernel can raise no error, and the place that it names may be anywhere.
template <class T>
GK_RECORD void run(const SeedOneHotRecord& op, const Tile<T> t) {
  const Order order(op.extent);
  over_copies(t, t.seeds, 1, [&](int m, int s, int) {
    const int64_t target = fixed(t.args.targets + t.sample(m) * t.args.target_n + t.s0 + s);
    const bool known = target >= 0 && target < order.size;
    const Element p = order.of(known ? static_cast<int>(target) : 0);
    t.at(op.dst, m, s, p.h, p.w)[p.c] = known ? T(1) : T(NAN);
  });
}

template <class T>
GK_RECORD void run(const SeedDenseRecord& op, const Tile<T> t) {
  const Order order(op.extent);
  const T* g = t.args.cotangents[op.cotangent];
  over_copies(t, t.seeds, order.size, [&](int m, int s, int e) {
    const Element p = order.of(e);
    t.at(op.dst, m, s, p.h, p.w)[p.c] += fixed(g + (t.sample(m) * t.args.seeds + t.s0 + s) * order.size + e);
  });
}

template <class T>
GK_DEVICE void run(const WindowTRecord&, const Tile<T>&) {}  // the CPU's

template <class T>
GK_DEVICE void run_record(const Record& record, const Tile<T> t) {
  switch (record.kind) {
#define X(name) \
  case Kind::name: return run(as<name##Record>(record), t);
    GRADKERN_KINDS(X)
#undef X
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
