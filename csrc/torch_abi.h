// The parts of torch that the ops use: tensors, errors, threads.  All of it is torch's stable ABI, so a library built
// against one version of torch runs under every later one, and under any Python.  No other header of torch is included.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace gradkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

template <class T>
void print(std::ostream& out, const T& part) {
  out << part;
}
inline void print(std::ostream& out, ScalarType dtype) { out << torch::headeronly::toString(dtype); }
inline void print(std::ostream& out, const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  if (device.is_cuda()) out << "cuda:" << device.index();
  else out << (device.is_cpu() ? "cpu" : device.type() == DeviceType::Meta ? "meta" : "another device");
}
inline void print(std::ostream& out, Shape shape) {
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "[") << shape[i];
  out << (shape.empty() ? "[]" : "]");
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (print(out, parts), ...);
  return out.str();
}

// RuntimeError and IndexError in Python.  torch's own macro for this would begin the message with a file and a line.
#define GRADKERN_CHECK(condition, ...) ((condition) ? void() : throw std::runtime_error(gradkern::text(__VA_ARGS__)))
#define GRADKERN_CHECK_INDEX(condition, ...) \
  ((condition) ? void() : throw std::out_of_range(gradkern::text(__VA_ARGS__)))

// The data pointer without a lookup of the element type, which the caller knows.
template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Runs work on torch's threads.  Exceptions keep their text, which the C interface in between would lose.
template <class F>
void parallel_for(int64_t end, int64_t grain, const F& body) {
  std::exception_ptr failure;
  std::mutex lock;
  torch::stable::parallel_for(0, end, grain, [&](int64_t first, int64_t last) {
    try {
      body(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> held(lock);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace gradkern
