// The view that a record's function has of its block: which samples, which seeds, where the buffers lie.
#pragma once
#include "args.h"
#include "device.cuh"

namespace gradkern::cuda {

template <class T>
struct Tile {
  const Args<T>& args;
  T* buf;
  int tile;       // number of the tile
  int first;      // first sample, within the tile, of those at hand
  int count;      // samples at hand
  int s0, seeds;  // seeds at hand

  // Sample m of those at hand: `stride` ≥ 0 counts from the tile's first sample, < 0 from the first one at hand.
  GK_DEVICE T* at(int64_t offset, int64_t stride, int m) const {
    const int step = static_cast<int>(stride);
    GK_SHARED(buf);
    return buf + static_cast<int>(offset) + (step >= 0 ? (first + m) * step : m * -step);
  }
  GK_DEVICE int64_t sample(int m) const { return static_cast<int64_t>(tile) * args.block + first + m; }
  GK_DEVICE int samples() const {
    const int64_t left = args.samples - static_cast<int64_t>(tile) * args.block;
    return left < args.block ? static_cast<int>(left) : args.block;
  }
  GK_DEVICE const uint8_t* planes(const Op& op, int m) const {
    const auto* bits = reinterpret_cast<const uint8_t*>(buf + args.region + args.planned * args.sample);
    GK_SHARED(bits);
    return bits + (first + m) * args.bits + static_cast<int>(op.bits);
  }
  GK_DEVICE int tid() const { return static_cast<int>(threadIdx.x); }
  GK_DEVICE int threads() const { return static_cast<int>(blockDim.x); }
  GK_DEVICE int warp() const { return tid() / kWarp; }
  GK_DEVICE int lane() const { return tid() % kWarp; }
  GK_DEVICE int warps() const { return threads() / kWarp; }
};

// Reads of pointers that may be null elsewhere, so that the compiler cannot see for itself where they point.
GK_DEVICE uint32_t shared_byte(const uint8_t* p) {
  GK_SHARED(p);
  return *p;
}
GK_DEVICE uint32_t shared_half(const uint8_t* p) {
  GK_SHARED(p);
  return *reinterpret_cast<const uint16_t*>(p);
}

// Position (h, w) and channel of an element in the caller's order [C][H][W].
struct Place {
  int c, h, w;
};
struct Places {
  Divider plane, row;

  GK_DEVICE Places(int H, int W) : plane(H * W), row(W) {}
  GK_DEVICE Place of(int i) const {
    const auto channel = plane.parts(i), line = row.parts(channel.rest);
    return {channel.quotient, line.quotient, line.rest};
  }
};

// The position that tap (jh, jw) of pool output (h, w) reads, or false outside.
GK_DEVICE bool tap_position(const Op& op, int h, int w, int jh, int jw, int& hi, int& wi) {
  hi = h * static_cast<int>(op.sh) - static_cast<int>(op.ph) + jh * static_cast<int>(op.dh);
  wi = w * static_cast<int>(op.sw) - static_cast<int>(op.pw) + jw * static_cast<int>(op.dw);
  return hi >= 0 && hi < static_cast<int>(op.Hi) && wi >= 0 && wi < static_cast<int>(op.Wi);
}

}  // namespace gradkern::cuda
