// Recurrent layers, forward and back through time, over blocks of samples.

#include <algorithm>
#include <cmath>
#include <vector>

#include "../torch_abi.h"
#include "isa.h"

namespace gradkern {
namespace {

constexpr int64_t kRows = 64;                   // samples, or samples times seeds, of a block
constexpr int64_t kNumbers = int64_t(1) << 19;  // the most slopes of a block of several samples

void check(bool fits, const Tensor& t, const char* name, Shape shape, const Tensor& like) {
  GRADKERN_CHECK(fits && t.scalar_type() == like.scalar_type() && t.device() == like.device(), "gradkern: ", name,
                 " must be ", like.scalar_type(), " of shape ", shape, ", got ", t.scalar_type(), " ", t.sizes());
}

void check_shape(const Tensor& t, const Ints& shape, const Tensor& like, const char* name) {
  const bool fits =
      t.dim() == static_cast<int64_t>(shape.size()) && std::equal(shape.begin(), shape.end(), t.sizes().begin());
  check(fits, t, name, Shape(shape.data(), shape.size()), like);
}

void check_rows(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  GRADKERN_CHECK(t.size(last) <= 1 || t.stride(last) == 1, "gradkern: the last axis of ", name, " must be contiguous");
}

// A layer's weights, checked.
struct Layer {
  Cell cell;
  const Tensors& w;  // W_ih [rows · H, I], W_hh [rows · H, H], and the biases [rows · H], if any
  int64_t rows, hidden, inputs;
};

Layer layer_of(int64_t cell, const Tensors& weights, const Tensor& x) {
  const bool floating = x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double;
  GRADKERN_CHECK(x.dim() == 3 && floating, "gradkern: x must be float32 or float64 [N, T, I], got ", x.scalar_type(),
                 " ", x.sizes());
  GRADKERN_CHECK(0 <= cell && cell <= 3, "gradkern: cell must be 0 … 3, got ", cell);
  GRADKERN_CHECK(weights.size() == 2 || weights.size() == 4, "gradkern: expected two weights, with or without two ",
                 "biases, got ", weights.size(), " tensors");
  GRADKERN_CHECK(weights[1].dim() == 2, "gradkern: W_hh must have two axes, got ", weights[1].sizes());
  const Cell kind = static_cast<Cell>(cell);
  const int64_t rows = kind == Cell::Lstm ? 4 : kind == Cell::Gru ? 3 : 1, H = weights[1].size(1), I = x.size(2);
  check_shape(weights[0], {rows * H, I}, x, "W_ih");
  check_shape(weights[1], {rows * H, H}, x, "W_hh");
  for (size_t k = 2; k < weights.size(); ++k) check_shape(weights[k], {rows * H}, x, "a bias");
  for (const Tensor& w : weights) GRADKERN_CHECK(w.is_contiguous(), "gradkern: all weights must be contiguous");
  return {kind, weights, rows, H, I};
}

// A matrix whose columns are stored in panels.
template <class T>
struct Panels {
  int64_t width, columns;
  std::vector<T> numbers;
  Panels(int64_t width, int64_t columns)
      : width(width), columns((columns + kPanel - 1) / kPanel * kPanel), numbers(width * this->columns) {}
  T& operator()(int64_t k, int64_t column) {
    return numbers[column / kPanel * kPanel * width + k * kPanel + column % kPanel];
  }
};

// The layer's weights in the order in which its kernels read them.
template <class T>
struct Packed {
  Panels<T> weight, weight_t;
  bool finite = true;

  explicit Packed(const Layer& l, bool back)
      : weight(l.inputs + l.hidden + 1, gates(l) * l.hidden),
        weight_t(gates(l) * l.hidden, back ? l.hidden + l.inputs : 0) {
    const T *const into = data<T>(l.w[0]), *const along = data<T>(l.w[1]);
    const int64_t H = l.hidden, I = l.inputs;
    for (int64_t j = 0; j < l.rows * H; ++j) {
      // The last gate of a GRU has a column for the input, and one for the state.
      const int64_t of_state = l.cell == Cell::Gru && j >= 2 * H ? j + H : j;
      for (int64_t k = 0; k < I; ++k) put(weight(k, j), into[j * I + k]);
      for (int64_t k = 0; k < H; ++k) put(weight(I + k, of_state), along[j * H + k]);
      for (size_t b = 2; b < l.w.size(); ++b) weight(I + H, b == 2 ? j : of_state) += data<T>(l.w[b])[j];
      for (int64_t k = 0; back && k < H; ++k) weight_t(of_state, k) = along[j * H + k];
      for (int64_t k = 0; back && k < I; ++k) weight_t(j, H + k) = into[j * I + k];
    }
  }

  static int64_t gates(const Layer& l) { return l.rows == 3 ? 4 : l.rows; }

 private:
  void put(T& to, T number) {
    to = number;
    finite &= std::isfinite(number);
  }
};

template <class T>
RecurrentArgs<T> arguments(const Layer& l, const Packed<T>& packed, const Tensor& x, const Tensor& y, bool reverse) {
  RecurrentArgs<T> a{};
  a.cell = l.cell, a.reverse = reverse, a.finite = packed.finite;
  a.x = data<T>(x), a.x_n = x.stride(0), a.x_t = x.stride(1);
  a.y_n = y.stride(0), a.y_t = y.stride(1);
  a.weight = packed.weight.numbers.data(), a.columns = packed.weight.columns;
  a.weight_t = packed.weight_t.numbers.data(), a.row = packed.weight_t.columns;
  a.steps = x.size(1), a.hidden = l.hidden, a.inputs = l.inputs, a.gates = Packed<T>::gates(l), a.seeds = 1;
  return a;
}

// Runs blocks of samples on torch's threads.  `scratch`: numbers per sample.
template <class T, class F>
void run_blocks(const RecurrentArgs<T>& a, int64_t samples, int64_t block, int64_t scratch, const F& run) {
  const int64_t threads = torch::stable::get_num_threads();
  block = std::clamp<int64_t>(block, 1, (samples + threads - 1) / threads);
  parallel_for((samples + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> memory(static_cast<size_t>(block * scratch + 5 * a.hidden));
    RecurrentArgs<T> local = a;
    local.scratch = memory.data();
    for (int64_t k = begin; k < end; ++k) run(local, k * block, std::min(samples, (k + 1) * block));
  });
}

template <class T>
void run_forward(const Kernels<T>& kernels, const Layer& l, const Tensor& x, bool reverse, const Tensor& y) {
  const Packed<T> packed(l, false);
  RecurrentArgs<T> a = arguments(l, packed, x, y, reverse);
  a.y = mutable_data<T>(y);
  run_blocks(a, x.size(0), kRows, a.forward_scratch(), kernels.recurrent);
}

template <class T>
void run_vjp(const Kernels<T>& kernels, const Layer& l, const Tensor& g, const Tensor& x, const Tensor& y, bool reverse,
             bool add, const Tensor& result) {
  const Packed<T> packed(l, true);
  RecurrentArgs<T> a = arguments(l, packed, x, y, reverse);
  a.y = const_cast<T*>(data<T>(y)), a.add = add;
  a.g = data<T>(g), a.g_n = g.stride(0), a.g_s = g.stride(1), a.g_t = g.stride(2);
  a.seeds = g.size(1), a.result = mutable_data<T>(result);
  const int64_t slopes = a.steps * a.step_scratch();
  const int64_t block = std::min(kRows / a.seeds, kNumbers / slopes);
  run_blocks(a, x.size(0), block, slopes + a.seeds * a.seed_scratch(), kernels.recurrent_vjp);
}

void recurrent(const Tensor& x, const Tensors& weights, int64_t cell, bool reverse, const Tensor& y) {
  const Layer l = layer_of(cell, weights, x);
  check_shape(y, {x.size(0), x.size(1), l.hidden}, x, "y");
  check_rows(x, "x"), check_rows(y, "y");
  if (y.numel() == 0) return;
  const Isa& isa = current_isa();
  if (x.scalar_type() == ScalarType::Float) run_forward<float>(isa.f32, l, x, reverse, y);
  else run_forward<double>(isa.f64, l, x, reverse, y);
}

void recurrent_vjp(const Tensor& g, const Tensor& x, const Tensor& y, const Tensors& weights, int64_t cell,
                   bool reverse, bool add, const Tensor& result) {
  const Layer l = layer_of(cell, weights, x);
  const int64_t N = x.size(0), T = x.size(1);
  GRADKERN_CHECK(g.dim() == 4, "gradkern: g must be [N, S, T, H], got ", g.sizes());
  check_shape(g, {N, g.size(1), T, l.hidden}, x, "g");
  check_shape(y, {N, T, l.hidden}, x, "y");
  check_shape(result, {N, g.size(1), T, l.inputs}, x, "result");
  check_rows(g, "g"), check_rows(x, "x"), check_rows(y, "y");
  GRADKERN_CHECK(result.is_contiguous(), "gradkern: result must be contiguous");
  if (result.numel() == 0 || g.numel() == 0) return;
  const Isa& isa = current_isa();
  if (x.scalar_type() == ScalarType::Float) run_vjp<float>(isa.f32, l, g, x, y, reverse, add, result);
  else run_vjp<double>(isa.f64, l, g, x, y, reverse, add, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gradkern, m) {
  // One recurrent layer in one direction, from a zero state: x [N, T, I] to y [N, T, H].  `cell`: context.h. `weights`:
  // as torch has them, W_ih [G H, I], W_hh [G H, H] and, if any, the biases [G H].
  m.def("recurrent(Tensor x, Tensor[] weights, int cell, bool reverse, Tensor(a!) y) -> ()");
  // Back through time for all seeds, g [N, S, T, H] to result [N, S, T, I], which it is added to if `add`.
  m.def(
      "recurrent_vjp(Tensor g, Tensor x, Tensor y, Tensor[] weights, int cell, bool reverse, bool add, "
      "Tensor(a!) result) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("recurrent", TORCH_BOX(&recurrent));
  m.impl("recurrent_vjp", TORCH_BOX(&recurrent_vjp));
}

}  // namespace gradkern
