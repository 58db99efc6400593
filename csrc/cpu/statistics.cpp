// Statistics of attributions over samples, in one pass over the maps of a batch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

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
  at::parallel_for(0, size, std::max<int64_t>(64, kGrain / samples), [&](int64_t begin, int64_t end) {
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

double* rows_of(const std::optional<at::Tensor>& t, int64_t size, const char* name) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(t->scalar_type() == at::kDouble && t->is_contiguous() && t->numel() == size, "gradkern: ", name,
              " must be contiguous float64 with ", size, " elements, got ", t->scalar_type(), " ", t->sizes());
  return t->mutable_data_ptr<double>();
}

void accumulate(const at::Tensor& maps, const at::Tensor& groups, const std::optional<at::Tensor>& sum,
                const std::optional<at::Tensor>& square, const std::optional<at::Tensor>& abs,
                const std::optional<at::Tensor>& max, const std::optional<at::Tensor>& group) {
  TORCH_CHECK(maps.dim() >= 1 && maps.is_contiguous(), "gradkern: maps must be contiguous [n, ...], got ",
              maps.sizes());
  const int64_t samples = maps.size(0), size = samples ? maps.numel() / samples : 0;
  if (size == 0) return;
  Rows to{};
  to.sum = rows_of(sum, size, "sum");
  to.square = rows_of(square, size, "square");
  to.abs = rows_of(abs, size, "abs");
  if (max.has_value()) {
    TORCH_CHECK(max->scalar_type() == at::kFloat && max->is_contiguous() && max->numel() == size,
                "gradkern: max must be contiguous float32 with ", size, " elements, got ", max->scalar_type(), " ",
                max->sizes());
    to.max = max->mutable_data_ptr<float>();
  }
  if (group.has_value()) {
    TORCH_CHECK(group->scalar_type() == at::kDouble && group->dim() >= 1 && group->size(0) > 0 &&
                    group->select(0, 0).is_contiguous() && group->select(0, 0).numel() == size,
                "gradkern: group must be float64 [G, ...] with ", size, " contiguous elements each, got ",
                group->scalar_type(), " ", group->sizes());
    TORCH_CHECK(groups.scalar_type() == at::kLong && groups.is_contiguous() && groups.numel() == samples,
                "gradkern: groups must be contiguous int64 [", samples, "], got ", groups.sizes());
    const int64_t* of = groups.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < samples; ++n)
      TORCH_CHECK(of[n] >= 0 && of[n] < group->size(0), "gradkern: group ", of[n], " of ", group->size(0));
    to.group = group->mutable_data_ptr<double>();
    to.group_stride = group->stride(0);
  }
  const int64_t* of = group.has_value() ? groups.const_data_ptr<int64_t>() : nullptr;
  if (maps.scalar_type() == at::kFloat) add_rows(maps.const_data_ptr<float>(), samples, size, of, to);
  else if (maps.scalar_type() == at::kDouble) add_rows(maps.const_data_ptr<double>(), samples, size, of, to);
  else TORCH_CHECK(false, "gradkern: statistics take float32 or float64, got ", maps.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gradkern, m) {
  // Adds maps [n, ...] to statistics [...] in place, and sample i also to row groups[i] of `group` [G, ...].
  m.def(
      "accumulate(Tensor maps, Tensor groups, Tensor(a!)? sum, Tensor(b!)? square, Tensor(c!)? abs, Tensor(d!)? max, "
      "Tensor(e!)? group) -> ()");
}

TORCH_LIBRARY_IMPL(gradkern, CPU, m) { m.impl("accumulate", accumulate); }

}  // namespace gradkern
