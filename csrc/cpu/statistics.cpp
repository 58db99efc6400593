// Statistics of attributions over samples, in one pass over the maps of a batch.

#include <algorithm>
#include <cmath>
#include <optional>

#include "../torch_abi.h"

namespace gradkern {
namespace {

// In numbers per thread.  For fewer numbers it is not worth waking a thread: on a busy machine that costs milliseconds.
constexpr int64_t kGrain = int64_t(1) << 22;

// Rows of sums, or null if a statistic is not wanted.  Every element is summed over the samples in order, in double, so
// the result depends neither on the threads nor on how the samples were divided into calls.
struct Rows {
  double *sum, *square, *abs, *group;
  float* max;
  int64_t group_stride;
};

template <class T>
void add_rows(const T* maps, int64_t samples, int64_t size, const int64_t* groups, const Rows& to) {
  parallel_for(size, std::max<int64_t>(64, kGrain / samples), [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < samples; ++n) {
      const T* row = maps + n * size;
      if (to.sum)
        for (int64_t f = begin; f < end; ++f) to.sum[f] += static_cast<double>(row[f]);
      if (to.square)
        for (int64_t f = begin; f < end; ++f) to.square[f] += static_cast<double>(row[f]) * static_cast<double>(row[f]);
      if (to.abs)
        for (int64_t f = begin; f < end; ++f) to.abs[f] += static_cast<double>(std::abs(row[f]));
      if (to.max)
        for (int64_t f = begin; f < end; ++f) {  // a NaN stays, as in torch.maximum
          const float v = static_cast<float>(std::abs(row[f]));
          to.max[f] = v > to.max[f] || v != v ? v : to.max[f];
        }
      if (to.group) {
        double* group = to.group + groups[n] * to.group_stride;
        for (int64_t f = begin; f < end; ++f) group[f] += static_cast<double>(std::abs(row[f]));
      }
    }
  });
}

double* rows_of(const std::optional<Tensor>& t, int64_t size, const char* name) {
  if (!t.has_value()) return nullptr;
  GRADKERN_CHECK(t->scalar_type() == ScalarType::Double && t->is_contiguous() && t->numel() == size, "gradkern: ", name,
                 " must be contiguous float64 with ", size, " elements, got ", t->scalar_type(), " ", t->sizes());
  return mutable_data<double>(*t);
}

void accumulate(const Tensor& maps, const Tensor& groups, const std::optional<Tensor>& sum,
                const std::optional<Tensor>& square, const std::optional<Tensor>& abs, const std::optional<Tensor>& max,
                const std::optional<Tensor>& group) {
  GRADKERN_CHECK(maps.dim() >= 1 && maps.is_contiguous(), "gradkern: maps must be contiguous [n, ...], got ",
                 maps.sizes());
  const int64_t samples = maps.size(0), size = samples ? maps.numel() / samples : 0;
  if (size == 0) return;
  Rows to{};
  to.sum = rows_of(sum, size, "sum");
  to.square = rows_of(square, size, "square");
  to.abs = rows_of(abs, size, "abs");
  if (max.has_value()) {
    GRADKERN_CHECK(max->scalar_type() == ScalarType::Float && max->is_contiguous() && max->numel() == size,
                   "gradkern: max must be contiguous float32 with ", size, " elements, got ", max->scalar_type(), " ",
                   max->sizes());
    to.max = mutable_data<float>(*max);
  }
  if (group.has_value()) {
    GRADKERN_CHECK(group->scalar_type() == ScalarType::Double && group->dim() >= 1 && group->size(0) > 0 &&
                       torch::stable::select(*group, 0, 0).is_contiguous() && group->numel() == size * group->size(0),
                   "gradkern: group must be float64 [G, ...] with ", size, " contiguous elements each, got ",
                   group->scalar_type(), " ", group->sizes());
    GRADKERN_CHECK(groups.scalar_type() == ScalarType::Long && groups.is_contiguous() && groups.numel() == samples,
                   "gradkern: groups must be contiguous int64 [", samples, "], got ", groups.sizes());
    const int64_t* of = data<int64_t>(groups);
    for (int64_t n = 0; n < samples; ++n)
      GRADKERN_CHECK(of[n] >= 0 && of[n] < group->size(0), "gradkern: group ", of[n], " of ", group->size(0));
    to.group = mutable_data<double>(*group);
    to.group_stride = group->stride(0);
  }
  const int64_t* of = group.has_value() ? data<int64_t>(groups) : nullptr;
  if (maps.scalar_type() == ScalarType::Float) add_rows(data<float>(maps), samples, size, of, to);
  else if (maps.scalar_type() == ScalarType::Double) add_rows(data<double>(maps), samples, size, of, to);
  else GRADKERN_CHECK(false, "gradkern: statistics take float32 or float64, got ", maps.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gradkern, m) {
  // Adds maps [n, ...] to statistics [...] in place, and sample i also to row groups[i] of `group` [G, ...].
  m.def(
      "accumulate(Tensor maps, Tensor groups, Tensor(a!)? sum, Tensor(b!)? square, Tensor(c!)? abs, Tensor(d!)? max, "
      "Tensor(e!)? group) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) { m.impl("accumulate", TORCH_BOX(&accumulate)); }

}  // namespace gradkern
