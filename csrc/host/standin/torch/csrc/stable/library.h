// See tensor.h.  The ops are kept by name, each with a function that reads its arguments from a recording.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <tuple>

namespace torch::stable::standin {

// The arguments of a recorded call, in order, and all tensors among them and among the results.
class Arguments {
 public:
  Arguments(const char* at, const char* end) : at_(at), end_(end) {}
  std::vector<Tensor> tensors;

  int64_t integer() {
    int64_t x;
    take(&x, 8);
    return x;
  }
  template <class A>
  A read() {
    if constexpr (std::is_same_v<A, Tensor>) {
      const int64_t type = integer();
      std::vector<int64_t> sizes = list(), strides = list();
      const auto bytes = static_cast<size_t>(integer());
      Tensor t(std::move(sizes), std::move(strides), static_cast<Tensor::Type>(type), bytes);
      take(static_cast<char*>(t.mutable_data_ptr()), bytes);
      tensors.push_back(t);
      return t;
    } else if constexpr (std::is_same_v<A, std::vector<Tensor>>) {
      std::vector<Tensor> all(static_cast<size_t>(integer()));
      for (Tensor& t : all) t = read<Tensor>();
      return all;
    } else if constexpr (std::is_same_v<A, std::optional<Tensor>>) {
      return integer() ? std::optional<Tensor>(read<Tensor>()) : std::nullopt;
    } else if constexpr (std::is_same_v<A, std::vector<int64_t>>) {
      return list();
    } else if constexpr (std::is_same_v<A, double>) {
      double x;
      take(&x, 8);
      return x;
    } else {
      return static_cast<A>(integer());
    }
  }

 private:
  const char *at_, *end_;
  void take(void* to, size_t bytes) {
    if (static_cast<size_t>(end_ - at_) < bytes) throw std::runtime_error("the recording is cut short");
    std::memcpy(to, at_, bytes);
    at_ += bytes;
  }
  std::vector<int64_t> list() {
    std::vector<int64_t> all(static_cast<size_t>(integer()));
    for (int64_t& x : all) x = integer();
    return all;
  }
};

using Results = std::vector<Tensor>;
// Changes decoded arguments, or nothing.
using Change = std::function<void(std::vector<Tensor*>&, std::vector<std::vector<int64_t>*>&, std::vector<int64_t*>&)>;
using Op = std::function<Results(Arguments&, const Change&)>;

inline std::map<std::string, Op>& ops() {
  static std::map<std::string, Op> all;
  return all;
}

struct Places {
  std::vector<Tensor*> tensors;
  std::vector<std::vector<int64_t>*> lists;
  std::vector<int64_t*> numbers;
  void of(Tensor& t) { tensors.push_back(&t); }
  void of(std::vector<Tensor>& all) {
    for (Tensor& t : all) tensors.push_back(&t);
  }
  void of(std::optional<Tensor>& t) {
    if (t) tensors.push_back(&*t);
  }
  void of(std::vector<int64_t>& list) { lists.push_back(&list); }
  void of(int64_t& x) { numbers.push_back(&x); }
  void of(bool&) {}
  void of(double&) {}
};

template <class R, class... A>
Op boxed(R (*f)(A...)) {
  return [f](Arguments& from, const Change& change) {
    std::tuple<std::decay_t<A>...> args{from.read<std::decay_t<A>>()...};  // braces: in order
    Places places;
    std::apply([&](auto&... a) { (places.of(a), ...); }, args);
    if (change) change(places.tensors, places.lists, places.numbers);
    if constexpr (std::is_same_v<R, Tensor>) return Results{std::apply(f, args)};
    else if constexpr (std::is_same_v<R, Results>) return std::apply(f, args);
    else return std::apply(f, args), Results{};
  };
}

struct Library {
  void def(const char*) {}
  void impl(const char* name, Op op) { ops()[name] = std::move(op); }
};

struct Registered {
  template <class F>
  explicit Registered(const F& f) {
    Library library;
    f(library);
  }
};

}  // namespace torch::stable::standin

#define TORCH_BOX(f) torch::stable::standin::boxed(f)
#define GK_STANDIN_JOIN2(a, b) a##b
#define GK_STANDIN_JOIN(a, b) GK_STANDIN_JOIN2(a, b)
#define GK_STANDIN(name)                                                                     \
  static void name(torch::stable::standin::Library&);                                        \
  static const torch::stable::standin::Registered GK_STANDIN_JOIN(name, _registered)(&name); \
  static void name(torch::stable::standin::Library& m)
#define STABLE_TORCH_LIBRARY(ns, m) GK_STANDIN(GK_STANDIN_JOIN(gk_define_, __LINE__))
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) GK_STANDIN(GK_STANDIN_JOIN(gk_extend_, __LINE__))
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) GK_STANDIN(GK_STANDIN_JOIN(gk_implement_, __LINE__))
