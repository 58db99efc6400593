// Statistics of attributions over samples, in one pass over the maps of a batch.

#include "statistics.h"

#include <algorithm>

#include "isa.h"

namespace gradkern {
namespace {

// The least numbers per thread.  For fewer, waking a thread does not pay: on a busy machine it costs milliseconds.
constexpr int64_t kGrain = int64_t(1) << 22;

void check_sums(const Tensor& t, int64_t size, const char* name, ScalarType dtype) {
  GRADKERN_CHECK(t.numel() == 0 || (t.scalar_type() == dtype && t.is_contiguous() && t.numel() == size),
                 "gradkern: ", name, " must be contiguous ", dtype, " with ", size, " elements, got ", t.scalar_type(),
                 " ", t.sizes());
}

template <class T>
T* data_or_null(const Tensor& t) {
  return t.numel() ? mutable_data<T>(t) : nullptr;
}

const Tensor& item(const Tensors& sums, size_t i) {
  GRADKERN_CHECK(sums.size() == 5, "gradkern: expected 5 statistics, got ", sums.size());
  return sums[i];
}

template <class T>
void add_rows(const Kernels<T>& kernels, const StatisticsArgs<T>& args, int64_t grain) {
  parallel_for(args.size, std::max<int64_t>(64, grain / args.samples),
               [&](int64_t begin, int64_t end) { kernels.add_rows(args, begin, end); });
}

template <class T>
StatisticsArgs<T> arguments(const Statistics& to, const Tensor& rows, int64_t first, const uint8_t* keep,
                            bool magnitude) {
  StatisticsArgs<T> a{};
  a.rows = data<T>(rows);
  a.samples = rows.size(0), a.size = a.samples ? rows.numel() / a.samples : 0;
  a.keep = keep, a.magnitude = magnitude;
  a.sum = data_or_null<double>(to.sum), a.square = data_or_null<double>(to.square);
  a.abs = data_or_null<double>(to.abs), a.max = data_or_null<float>(to.max), a.group = data_or_null<double>(to.group);
  if (a.group) a.groups = data<int64_t>(to.groups) + first, a.group_stride = to.group.stride(0);
  return a;
}

void accumulate(const Tensor& maps, const Tensor& groups, const Tensors& sums) {
  GRADKERN_CHECK(maps.dim() >= 1 && maps.is_contiguous(), "gradkern: maps must be contiguous [n, ...], got ",
                 maps.sizes());
  if (maps.numel() == 0) return;
  const Statistics to(sums, groups, maps.size(0), maps.numel() / maps.size(0));
  to.add(maps, 0, nullptr, false, kGrain);
}

}  // namespace

Statistics::Statistics(const Tensors& sums, const Tensor& groups, int64_t samples, int64_t size)
    : sum(item(sums, 0)),
      square(item(sums, 1)),
      abs(item(sums, 2)),
      max(item(sums, 3)),
      group(item(sums, 4)),
      groups(groups) {
  check_sums(sum, size, "sum", ScalarType::Double);
  check_sums(square, size, "square", ScalarType::Double);
  check_sums(abs, size, "abs", ScalarType::Double);
  check_sums(max, size, "max", ScalarType::Float);
  if (group.numel() == 0) return;
  GRADKERN_CHECK(group.scalar_type() == ScalarType::Double && group.dim() >= 1 && group.size(0) > 0 &&
                     torch::stable::select(group, 0, 0).is_contiguous() && group.numel() == size * group.size(0),
                 "gradkern: group must be float64 [G, ...] with ", size, " contiguous elements each, got ",
                 group.scalar_type(), " ", group.sizes());
  GRADKERN_CHECK(groups.scalar_type() == ScalarType::Long && groups.is_contiguous() && groups.numel() == samples,
                 "gradkern: groups must be contiguous int64 [", samples, "], got ", groups.sizes());
  const int64_t* of = data<int64_t>(groups);
  for (int64_t n = 0; n < samples; ++n)
    GRADKERN_CHECK(of[n] >= 0 && of[n] < group.size(0), "gradkern: group ", of[n], " of ", group.size(0));
}

void Statistics::add(const Tensor& rows, int64_t first, const uint8_t* keep, bool magnitude, int64_t grain) const {
  const Isa& isa = current_isa();
  if (rows.scalar_type() == ScalarType::Float)
    add_rows(isa.f32, arguments<float>(*this, rows, first, keep, magnitude), grain);
  else if (rows.scalar_type() == ScalarType::Double)
    add_rows(isa.f64, arguments<double>(*this, rows, first, keep, magnitude), grain);
  else GRADKERN_CHECK(false, "gradkern: statistics take float32 or float64, got ", rows.scalar_type());
}

STABLE_TORCH_LIBRARY_FRAGMENT(gradkern, m) {
  // Adds maps [n, ...] in place to `sums`: of the maps, their squares and their absolute values, the largest absolute
  // values, and the absolute values by group [G, ...], where sample i goes to row groups[i].  Empty: not taken.
  m.def("accumulate(Tensor maps, Tensor groups, Tensor(a!)[] sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) { m.impl("accumulate", TORCH_BOX(&accumulate)); }

}  // namespace gradkern
