// The walks of a recurrent layer through time, over blocks of samples.

#include <algorithm>
#include <optional>
#include <vector>

#include "../torch_abi.h"
#include "isa.h"

namespace gradkern {
namespace {

constexpr int64_t kRows = 64;                 // samples times seeds of a block
constexpr int64_t kGrain = int64_t(1) << 15;  // the least numbers per thread

void check_shape(const Tensor& t, const Ints& shape, const Tensor& like, const char* name) {
  const bool fits =
      t.dim() == static_cast<int64_t>(shape.size()) && std::equal(shape.begin(), shape.end(), t.sizes().begin());
  GRADKERN_CHECK(fits && t.scalar_type() == like.scalar_type() && t.device() == like.device(), "gradkern: ", name,
                 " must be ", like.scalar_type(), " of shape ", Shape(shape.data(), shape.size()), ", got ",
                 t.scalar_type(), " ", t.sizes());
}

void check_floating(const Tensor& t, int64_t dim, const char* what) {
  const bool floating = t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double;
  GRADKERN_CHECK(t.dim() == dim && floating, "gradkern: ", what, ", got ", t.scalar_type(), " ", t.sizes());
}

template <class T>
void walk(const Kernels<T>& kernels, const Tensor& g, const Tensor& slopes, const std::optional<Tensor>& keep,
          const std::optional<Tensor>& through, const Tensor& weight, bool reverse, const Tensor& result) {
  RecurrentArgs<T> a{};
  a.cell = through ? Cell::Lstm : keep ? Cell::Gru : Cell::Plain, a.reverse = reverse;
  a.g = data<T>(g), a.g_n = g.stride(0), a.g_s = g.stride(1), a.g_t = g.stride(2);
  a.slopes = data<T>(slopes), a.weight = data<T>(weight), a.result = mutable_data<T>(result);
  a.keep = keep ? data<T>(*keep) : a.slopes, a.through = through ? data<T>(*through) : a.slopes;
  a.seeds = g.size(1), a.steps = g.size(2), a.hidden = g.size(3), a.inputs = result.size(3);
  a.gates = slopes.size(2), a.row = weight.size(1);
  const int64_t n = g.size(0), threads = torch::stable::get_num_threads();
  const int64_t block = std::clamp<int64_t>(kRows / a.seeds, 1, (n + threads - 1) / threads);
  parallel_for((n + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> memory(static_cast<size_t>(block * a.seeds * ((a.gates + 1) * a.hidden + a.row)));
    RecurrentArgs<T> local = a;
    local.scratch = memory.data();
    for (int64_t k = begin; k < end; ++k) kernels.recurrent(local, k * block, std::min(n, (k + 1) * block));
  });
}

void recurrent_walk(const Tensor& g, const Tensor& slopes, const std::optional<Tensor>& keep,
                    const std::optional<Tensor>& through, const Tensor& weight, bool reverse, const Tensor& result) {
  check_floating(g, 4, "g must be float32 or float64 [N, S, T, H]");
  GRADKERN_CHECK(g.size(3) <= 1 || g.stride(3) == 1, "gradkern: the last axis of g must be contiguous");
  GRADKERN_CHECK(keep || !through, "gradkern: through needs keep");
  const int64_t n = g.size(0), seeds = g.size(1), steps = g.size(2), H = g.size(3), gates = keep ? 4 : 1;
  GRADKERN_CHECK(result.dim() == 4 && weight.dim() == 2,
                 "gradkern: result must be [N, S, T, I] and weight [G H, R], got ", result.sizes(), " and ",
                 weight.sizes());
  const int64_t I = result.size(3), row = weight.size(1);
  check_shape(slopes, {n, steps, gates, H}, g, "slopes");
  check_shape(weight, {gates * H, row}, g, "weight");
  check_shape(result, {n, seeds, steps, I}, g, "result");
  if (keep) check_shape(*keep, {n, steps, H}, g, "keep");
  if (through) check_shape(*through, {n, steps, H}, g, "through");
  GRADKERN_CHECK(row % 16 == 0 && row >= H + I,
                 "gradkern: a row of weight must have a multiple of 16 numbers, at least ", H + I, ", got ", row);
  const bool packed = slopes.is_contiguous() && weight.is_contiguous() && result.is_contiguous() &&
                      (!keep || keep->is_contiguous()) && (!through || through->is_contiguous());
  GRADKERN_CHECK(packed, "gradkern: all tensors but g must be contiguous");
  if (result.numel() == 0 || H == 0) return;
  const Isa& isa = current_isa();
  if (g.scalar_type() == ScalarType::Float) walk<float>(isa.f32, g, slopes, keep, through, weight, reverse, result);
  else walk<double>(isa.f64, g, slopes, keep, through, weight, reverse, result);
}

template <class T>
void add_kept(T* cells, const T* keep, int64_t samples, int64_t steps, int64_t H, bool reverse) {
  parallel_for(samples, std::max<int64_t>(1, kGrain / (steps * H)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t k = 1; k < steps; ++k) {
        const int64_t at = n * steps + (reverse ? steps - 1 - k : k);
        T* const now = cells + at * H;
        const T *const before = reverse ? now + H : now - H, *const kept = keep + at * H;
        for (int64_t i = 0; i < H; ++i) now[i] += kept[i] * before[i];
      }
  });
}

void recurrent_cells(const Tensor& cells, const Tensor& keep, bool reverse) {
  check_floating(cells, 3, "cells must be float32 or float64 [N, T, H]");
  const int64_t n = cells.size(0), steps = cells.size(1), H = cells.size(2);
  check_shape(keep, {n, steps, H}, cells, "keep");
  GRADKERN_CHECK(cells.is_contiguous() && keep.is_contiguous(), "gradkern: cells and keep must be contiguous");
  if (cells.numel() == 0) return;
  if (cells.scalar_type() == ScalarType::Float)
    add_kept(mutable_data<float>(cells), data<float>(keep), n, steps, H, reverse);
  else add_kept(mutable_data<double>(cells), data<double>(keep), n, steps, H, reverse);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gradkern, m) {
  // A recurrent layer's walk back through time for all seeds, g [N, S, T, H] to result [N, S, T, I].  `slopes`
  // [N, T, G, H] of the gates, `weight` [G H, R]: from gates to state in the first H columns, to input in the next I; R
  // is a multiple of 16.  A plain RNN has one gate.  A GRU has four, the last gate twice, on the side of the state and
  // on that of the input, and in `keep` [N, T, H] what a state keeps of the one before it.  An LSTM has four, in `keep`
  // the same of its cell, and in `through` [N, T, H] the slope from cell to state.
  m.def(
      "recurrent_walk(Tensor g, Tensor slopes, Tensor? keep, Tensor? through, Tensor weight, bool reverse, "
      "Tensor(a!) result) -> ()");
  // cells[:, t] += keep[:, t] * cells[:, t - 1] for every step in turn, or in reverse; both [N, T, H].
  m.def("recurrent_cells(Tensor(a!) cells, Tensor keep, bool reverse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("recurrent_walk", TORCH_BOX(&recurrent_walk));
  m.impl("recurrent_cells", TORCH_BOX(&recurrent_cells));
}

}  // namespace gradkern
