// A stand-in for the part of torch's stable ABI that ../../../../../../torch_abi.h uses, for the sanitizers: tensors
// are memory of exactly their size, and threads are the standard library's.
#pragma once
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <vector>

namespace torch::stable {

struct Device {
  bool is_cuda() const { return false; }
  bool is_cpu() const { return true; }
  int index() const { return 0; }
  torch::headeronly::DeviceType type() const { return torch::headeronly::DeviceType::CPU; }
  bool operator==(const Device&) const { return true; }
};

class Tensor {
 public:
  using Type = torch::headeronly::ScalarType;
  using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

  Tensor() = default;
  Tensor(std::vector<int64_t> sizes, Type type) : sizes_(std::move(sizes)), type_(type) {
    strides_.resize(sizes_.size());
    int64_t stride = 1;
    for (size_t i = sizes_.size(); i-- > 0; stride *= sizes_[i] ? sizes_[i] : 1) {
      if (sizes_[i] < 0) throw std::runtime_error("a size is negative");
      strides_[i] = stride;
    }
    allocate(static_cast<size_t>(numel() * element_size()));
  }
  Tensor(std::vector<int64_t> sizes, std::vector<int64_t> strides, Type type, size_t bytes)
      : sizes_(std::move(sizes)), strides_(std::move(strides)), type_(type) {
    allocate(bytes);
  }

  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t i) const { return sizes_.at(axis(i)); }
  int64_t stride(int64_t i) const { return strides_.at(axis(i)); }
  Shape sizes() const { return Shape(sizes_.data(), sizes_.size()); }
  Shape strides() const { return Shape(strides_.data(), strides_.size()); }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t s : sizes_) n *= s;
    return n;
  }
  Type scalar_type() const { return type_; }
  size_t element_size() const {
    switch (type_) {
      case Type::Double:
      case Type::Long: return 8;
      case Type::Float:
      case Type::Int: return 4;
      case Type::Half:
      case Type::BFloat16: return 2;
      default: return 1;
    }
  }
  bool is_contiguous() const {
    int64_t stride = 1;
    if (numel() == 0) return true;
    for (size_t i = sizes_.size(); i-- > 0; stride *= sizes_[i])
      if (sizes_[i] != 1 && strides_[i] != stride) return false;
    return true;
  }
  Device device() const { return {}; }
  const void* const_data_ptr() const { return memory_.get(); }
  void* mutable_data_ptr() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }
  Tensor first_row() const {
    Tensor t = *this;
    t.sizes_.erase(t.sizes_.begin()), t.strides_.erase(t.strides_.begin());
    return t;
  }
  Tensor rows(int64_t start, int64_t length) const {
    if (start < 0 || length < 0 || start + length > size(0)) throw std::runtime_error("rows out of range");
    Tensor t = *this;
    t.sizes_[0] = length;
    t.memory_ = {memory_, memory_.get() + static_cast<size_t>(start * stride(0)) * element_size()};
    return t;
  }

 private:
  std::vector<int64_t> sizes_, strides_;
  Type type_ = Type::Float;
  std::shared_ptr<char> memory_;
  size_t bytes_ = 0;

  size_t axis(int64_t i) const { return static_cast<size_t>(i < 0 ? i + dim() : i); }
  void allocate(size_t bytes) {
    bytes_ = bytes;
    memory_.reset(static_cast<char*>(std::malloc(bytes ? bytes : 1)), std::free);
    if (!memory_) throw std::runtime_error("out of memory");
  }
};

}  // namespace torch::stable
