// A record function's view of its block: the samples, the seeds and the buffers.
// docs/architecture.md says what the letters of loops and operands stand for.
#pragma once
#include "chain.h"
#include "device.cuh"

namespace gradkern::cuda {

// A row of integers as the record of its kind.
template <class R>
GK_DEVICE const R& as(const Record& record) {
  static_assert(sizeof(R) <= sizeof(Record));
  return reinterpret_cast<const R&>(record);
}

template <class T>
struct Tile {
  const Args<T>& args;
  T* buf;
  int tile;       // number of the tile
  int first;      // first sample, within the tile, of those at hand
  int count;      // samples at hand
  int s0, seeds;  // seeds at hand

  // For the current sample m: the place's stride between samples counts from the tile's first sample or, if it is
  // negative, from the first current sample.
  GK_DEVICE T* at(const Place& place, int m) const {
    const int step = static_cast<int>(place.sample);
    return buf + static_cast<int>(place.offset) + (step >= 0 ? (first + m) * step : m * -step);
  }
  GK_DEVICE T* at(const Place& place, int m, int seed) const {
    return at(place, m) + seed * static_cast<int>(place.seed);
  }
  GK_DEVICE int64_t sample(int m) const { return static_cast<int64_t>(tile) * args.block + first + m; }
  GK_DEVICE int samples() const {
    const int64_t left = args.samples - static_cast<int64_t>(tile) * args.block;
    return left < args.block ? static_cast<int>(left) : args.block;
  }
  GK_DEVICE uint8_t* bits(const PatternRef& pattern, int m) const {
    auto* const all = reinterpret_cast<uint8_t*>(buf + args.region + args.planned * args.sample);
    return all + (first + m) * args.bits + static_cast<int>(pattern.bits);
  }
  GK_DEVICE int tid() const { return static_cast<int>(threadIdx.x); }
  GK_DEVICE int threads() const { return static_cast<int>(blockDim.x); }
  GK_DEVICE int warp() const { return tid() / kWarp; }
  GK_DEVICE int lane() const { return tid() % kWarp; }
  GK_DEVICE int warps() const { return threads() / kWarp; }
};

// The elements from a place's first position to another.
struct Steps {
  int row, position;

  GK_DEVICE explicit Steps(const Place& place)
      : row(static_cast<int>(place.row)), position(static_cast<int>(place.position)) {}
  GK_DEVICE int operator()(int h, int w) const { return h * row + w * position; }
};

// Whether everything that is read or written there can be moved four elements at a time.
GK_DEVICE bool by_fours(const Place& p) { return ((p.offset | p.sample | p.seed | p.row | p.position) & 3) == 0; }

// Pointers are generic on purpose: with __builtin_assume(__isShared(p)) nvcc 13.0 made code for quads.cuh and
// narrow.cuh that gave wrong sums on an H200 (benchmarks/notes-cuda.md, first run).
GK_DEVICE uint32_t half_word(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }

// An element in the caller's order [C][H][W].
struct Element {
  int c, h, w;
};
struct Order {
  int size;
  Divider plane, row;

  GK_DEVICE explicit Order(const Extent& extent)
      : size(static_cast<int>(extent.C * extent.H * extent.W)),
        plane(static_cast<int>(extent.H * extent.W)),
        row(static_cast<int>(extent.W)) {}
  GK_DEVICE Element of(int i) const {
    const auto channel = plane.parts(i), line = row.parts(channel.rest);
    return {channel.quotient, line.quotient, line.rest};
  }
};

// The position that tap (jh, jw) of pool output (h, w) reads, or false outside.
GK_DEVICE bool tap_position(const PatternRef& p, int h, int w, int jh, int jw, int& hi, int& wi) {
  hi = h * static_cast<int>(p.sh) - static_cast<int>(p.ph) + jh * static_cast<int>(p.dh);
  wi = w * static_cast<int>(p.sw) - static_cast<int>(p.pw) + jw * static_cast<int>(p.dw);
  return hi >= 0 && hi < static_cast<int>(p.H) && wi >= 0 && wi < static_cast<int>(p.W);
}

}  // namespace gradkern::cuda
