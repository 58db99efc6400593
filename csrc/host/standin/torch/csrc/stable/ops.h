// See tensor.h.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <thread>

namespace torch::stable {

inline int64_t& thread_count() {
  static int64_t count = 3;
  return count;
}
inline int64_t get_num_threads() { return thread_count(); }

// Even parts of the range, one per thread.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t count = end - begin, least = std::max<int64_t>(grain, 1);
  const int64_t parts = std::min(thread_count(), (count + least - 1) / least);
  std::vector<std::thread> threads;
  for (int64_t k = 1; k < parts; ++k)
    threads.emplace_back([&, k] { f(begin + count * k / parts, begin + count * (k + 1) / parts); });
  if (count > 0) f(begin, begin + count / std::max<int64_t>(parts, 1));
  for (std::thread& thread : threads) thread.join();
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return Tensor(std::vector<int64_t>(sizes), like.scalar_type());
}
inline Tensor contiguous(const Tensor& t) {
  if (!t.is_contiguous()) throw std::runtime_error("the stand-in has no copy of a tensor that is not contiguous");
  return t;
}
inline Tensor narrow(const Tensor& t, int64_t, int64_t start, int64_t length) { return t.rows(start, length); }
inline Tensor select(const Tensor& t, int64_t, int64_t) { return t.first_row(); }

}  // namespace torch::stable
