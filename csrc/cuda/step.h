// The arguments of a step's launch, and what its launcher and its kernels say to each other: plain data, no torch.
#pragma once
#include "args.h"

namespace gradkern::cuda {

constexpr int kStepThreads = 256;
constexpr int kSlice = 16;        // terms of the sums that a block holds in shared memory at a time
constexpr uint8_t kNobody = 255;  // a place of `choice` that no tap of the pool was chosen for

// out[row][o][place · out + first] = Σ_tap Σ_k src[row][k][place · step + tap] · w[tap][k][o]: a convolution or its
// transpose.  A strided transpose falls into phases, each with the taps that meet its places; everything else has one.
template <class T>
struct StepArgs {
  const T* src;           // [rows][groups · K][Hs][Ws]
  const T* weight;        // [groups][all_taps][K][ldw]
  const T* bias;          // [groups · O], or null
  const T* add;           // [rows][groups · O][H][W], or null: added to the result
  const T* mask;          // [kept rows][groups · O][H][W], or null: the result passes where this is not ≤ 0
  const uint8_t* choice;  // [kept rows][groups · O][H][W], or null: the tap of the pool that the result goes to
  T* out;                 // [rows][groups · O][H][W], or [rows][groups · O][pool_H][pool_W]
  const int32_t* phases;  // per phase: height, width, first row, first column, first tap, taps
  const int32_t* taps;    // per tap: rows and columns from a place to what it reads, number in the weight
  int64_t rows;           // samples · seeds · inner
  int seeds, inner;       // rows of a sample are [seeds][inner]; those of `mask` and `choice` have no seeds
  int groups, K, O, ldw, all_taps;
  int Hs, Ws, step_h, step_w;
  int H, W, out_h, out_w;
  int linear;                          // 1: one place and one tap, so that rows are read along their channels
  int relu;                            // 1: negative results become zero
  int pool_h, pool_w, pool_H, pool_W;  // of `choice`: the pool's window, and the extent of what it read
  int phase_count, places;             // places of the largest phase
};

// `Math` as in args.h; `narrow`: few results per place.
template <class T, int Math>
const char* launch_step(const StepArgs<T>& args, bool narrow, void* stream);

}  // namespace gradkern::cuda
