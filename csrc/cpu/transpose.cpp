// The last step of forward mode: the tangents of the output become the rows of Jacobians.

#include <algorithm>
#include <optional>

#include "../torch_abi.h"
#include "isa.h"

namespace gradkern {
namespace {

constexpr int64_t kBlock = 64;                // outputs whose rows are written together, so that they stay in the cache
constexpr int64_t kGrain = int64_t(1) << 15;  // the least numbers per thread

// to[s][d] = rows[d][index of s] for D lines of `rows`, which have `outputs` numbers each.
template <int D, class T, class Index>
void write_lines(const T* rows, int64_t outputs, int64_t begin, int64_t end, int64_t size, const Index& index, T* to) {
  for (int64_t s = begin; s < end; ++s) {
    const T* const from = rows + index(s);
    T numbers[D];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) numbers[d] = from[d * outputs];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) to[s * size + d] = numbers[d];
  }
}

// The same for all `size` lines of one sample.
template <class T, class Index>
void write(const T* rows, int64_t outputs, int64_t seeds, int64_t size, const Index& index, T* to) {
  for (int64_t begin = 0; begin < seeds; begin += kBlock) {
    const int64_t end = std::min(seeds, begin + kBlock);
    int64_t d = 0;
    for (; d + 8 <= size; d += 8) write_lines<8>(rows + d * outputs, outputs, begin, end, size, index, to + d);
    for (; d + 2 <= size; d += 2) write_lines<2>(rows + d * outputs, outputs, begin, end, size, index, to + d);
    if (d < size) write_lines<1>(rows + d * outputs, outputs, begin, end, size, index, to + d);
  }
}

template <class T>
void write_samples(const Kernels<T>& kernels, const Tensor& rows, const int64_t* targets, int64_t target_stride,
                   const Tensors& out, const Tensor& finite) {
  const int64_t samples = rows.size(0), tangents = rows.size(1), outputs = rows.size(2), seeds = out[0].size(1);
  parallel_for(samples, std::max<int64_t>(1, kGrain / (tangents * outputs)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const T* from = data<T>(rows) + n * tangents * outputs;
      mutable_data<bool>(finite)[n] = kernels.all_finite(from, tangents * outputs);
      for (const Tensor& part : out) {
        const int64_t size = part.numel() / (samples * seeds);
        T* to = mutable_data<T>(part) + n * seeds * size;
        const int64_t* chosen = targets ? targets + n * target_stride : nullptr;
        if (chosen) write(from, outputs, seeds, size, [&](int64_t s) { return chosen[s]; }, to);
        else write(from, outputs, seeds, size, [](int64_t s) { return s; }, to);
        from += size * outputs;
      }
    }
  });
}

void check(const Tensor& rows, const std::optional<Tensor>& targets, const Tensors& out, const Tensor& finite) {
  GRADKERN_CHECK(rows.dim() == 3 && rows.is_contiguous(), "gradkern: tangents must be contiguous [N, D, C], got ",
                 rows.sizes());
  GRADKERN_CHECK(rows.scalar_type() == ScalarType::Float || rows.scalar_type() == ScalarType::Double,
                 "gradkern: tangents must be float32 or float64, got ", rows.scalar_type());
  GRADKERN_CHECK(!out.empty() && out[0].dim() >= 2, "gradkern: expected results [N, S, ...]");
  const int64_t samples = rows.size(0), outputs = rows.size(2), seeds = out[0].size(1);
  int64_t columns = 0;
  for (const Tensor& part : out) {
    GRADKERN_CHECK(part.is_contiguous() && part.scalar_type() == rows.scalar_type() && part.dim() >= 2 &&
                       part.size(0) == samples && part.size(1) == seeds,
                   "gradkern: results must be contiguous ", rows.scalar_type(), " [", samples, ", ", seeds,
                   ", ...], got ", part.scalar_type(), " ", part.sizes());
    columns += part.numel() / std::max<int64_t>(1, samples * seeds);
  }
  GRADKERN_CHECK(rows.numel() == 0 || seeds == 0 || columns == rows.size(1), "gradkern: ", rows.size(1),
                 " tangents for results of ", columns, " elements");
  GRADKERN_CHECK(finite.scalar_type() == ScalarType::Bool && finite.is_contiguous() && finite.numel() == samples,
                 "gradkern: finite must be contiguous Bool [", samples, "], got ", finite.scalar_type(), " ",
                 finite.sizes());
  if (!targets) {
    GRADKERN_CHECK(seeds == outputs, "gradkern: ", outputs, " outputs for results of ", seeds, " seeds");
    return;
  }
  GRADKERN_CHECK(targets->scalar_type() == ScalarType::Long && targets->is_contiguous() &&
                     (targets->numel() == seeds || targets->numel() == samples * seeds),
                 "gradkern: targets must be contiguous Long [", seeds, "] or [", samples, ", ", seeds, "], got ",
                 targets->scalar_type(), " ", targets->sizes());
  const int64_t* index = data<int64_t>(*targets);
  for (int64_t i = 0; i < targets->numel(); ++i)
    GRADKERN_CHECK_INDEX(0 <= index[i] && index[i] < outputs, "gradkern: target ", index[i], " is out of range for ",
                         outputs, " outputs");
}

void write_transposed(const Tensor& rows, const std::optional<Tensor>& targets, const Tensors& out,
                      const Tensor& finite) {
  check(rows, targets, out, finite);
  if (rows.numel() == 0 || out[0].size(1) == 0) return;
  const Isa& isa = current_isa();
  const int64_t* index = targets ? data<int64_t>(*targets) : nullptr;
  const int64_t stride = targets && targets->dim() == 2 ? out[0].size(1) : 0;
  if (rows.scalar_type() == ScalarType::Float) write_samples<float>(isa.f32, rows, index, stride, out, finite);
  else write_samples<double>(isa.f64, rows, index, stride, out, finite);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gradkern, m) {
  // Fills `out`, one [N, S, size] per input, from the tangents of the output `rows` [N, D, C] at the outputs `targets`,
  // [S] or [N, S]; by default at all.  finite[n]: whether all tangents of a sample are finite.
  m.def("write_transposed(Tensor rows, Tensor? targets, Tensor(a!)[] out, Tensor(b!) finite) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) { m.impl("write_transposed", TORCH_BOX(&write_transposed)); }

}  // namespace gradkern
