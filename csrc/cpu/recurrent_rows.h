// Recurrent layers, forward and back through time for all seeds; included once per ISA, like body.h.

namespace {

// c [rows][columns] = a [rows][width] · b [width][columns], R rows and P vectors at a time, from column `at` on.  The
// columns of `b` are stored in panels, so that a tile reads consecutive numbers.
template <class T, int R, int P>
GK_INLINE void product_tile(const T* a, int64_t width, const T* b, int64_t at, T* c, int64_t columns) {
  constexpr int VL = Simd<T>::VL;
  const T* from[P];
  for (int p = 0; p < P; ++p) from[p] = b + (at + p * VL) / kPanel * kPanel * width + (at + p * VL) % kPanel;
  Vec<T> sums[R][P] = {};
  for (int64_t k = 0; k < width; ++k) {
    Vec<T> w[P];
    for (int p = 0; p < P; ++p) w[p] = load(from[p] + k * kPanel);
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = bcast(a[r * width + k]);
      for (int p = 0; p < P; ++p) sums[r][p] += x * w[p];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) store(c + r * columns + at + p * VL, sums[r][p]);
}

template <class T, int P>
void product_columns(int64_t rows, const T* a, int64_t width, const T* b, int64_t at, T* c, int64_t columns) {
  int64_t r = 0;
  for (; r + 6 <= rows && r + 8 != rows; r += 6)
    product_tile<T, 6, P>(a + r * width, width, b, at, c + r * columns, columns);
  for (; r + 4 <= rows; r += 4) product_tile<T, 4, P>(a + r * width, width, b, at, c + r * columns, columns);
  for (; r + 2 <= rows; r += 2) product_tile<T, 2, P>(a + r * width, width, b, at, c + r * columns, columns);
  for (; r < rows; ++r) product_tile<T, 1, P>(a + r * width, width, b, at, c + r * columns, columns);
}

template <class T>
void product(int64_t rows, const T* a, int64_t width, const T* b, T* c, int64_t columns) {
  constexpr int VL = Simd<T>::VL, P = GK_REGISTERS >= 32 ? 4 : 2;
  int64_t at = 0;
  for (; at + P * VL <= columns; at += P * VL) product_columns<T, P>(rows, a, width, b, at, c, columns);
  for (; at + 2 * VL <= columns; at += 2 * VL) product_columns<T, 2>(rows, a, width, b, at, c, columns);
  for (; at < columns; at += VL) product_columns<T, 1>(rows, a, width, b, at, c, columns);
}

template <class T>
GK_INLINE void copy_row(T* to, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// The row of inputs, state and one that the gates are computed from; a null state is zero.
template <class T>
GK_INLINE void gate_inputs(const RecurrentArgs<T>& a, const T* x, const T* state, T* row) {
  copy_row(row, x, a.inputs);
  for (int64_t i = 0; i < a.hidden; ++i) row[a.inputs + i] = state ? state[i] : T(0);
  row[a.inputs + a.hidden] = 1;
}

// x = F(x), each loop with one function, so that the compiler vectorizes it.
template <Fn F, class T>
void apply(int64_t count, T* x) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) x[i] = Function<F>::at(x[i], T(0), T(0), T(0)).y;
}

// The same, and its derivative.
template <Fn F, class T>
void apply(int64_t count, T* x, T* derivative) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const ValueAndDerivative<T> r = Function<F>::at(x[i], T(0), T(0), T(0));
    x[i] = r.y, derivative[i] = r.d;
  }
}

// One time step of one sample: from its gates before their functions, `z`, to the next state and cell.
template <class T, Cell C>
GK_INLINE void forward_row(int64_t H, T* z, T* state, T* cell) {
  if constexpr (C == Cell::Gru) {
    T *const u = z + H, *const n = z + 2 * H;
    apply<Fn::sigmoid>(2 * H, z);
    for (int64_t i = 0; i < H; ++i) n[i] += z[i] * z[3 * H + i];
    apply<Fn::tanh>(H, n);
    for (int64_t i = 0; i < H; ++i) state[i] = n[i] + u[i] * (state[i] - n[i]);
  } else if constexpr (C == Cell::Lstm) {
    apply<Fn::sigmoid>(2 * H, z);
    apply<Fn::tanh>(H, z + 2 * H);
    apply<Fn::sigmoid>(H, z + 3 * H);
    for (int64_t i = 0; i < H; ++i) state[i] = cell[i] = z[H + i] * cell[i] + z[i] * z[2 * H + i];
    apply<Fn::tanh>(H, state);
    for (int64_t i = 0; i < H; ++i) state[i] *= z[3 * H + i];
  } else {
    copy_row(state, z, H);
    apply<C == Cell::Tanh ? Fn::tanh : Fn::relu>(H, state);
  }
}

template <class T, Cell C>
void forward(const RecurrentArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t H = a.hidden, count = end - begin, width = a.width();
  T *const rows = a.scratch, *const z = rows + count * width, *const cells = z + count * a.columns;
  for (int64_t i = 0; i < count * H; ++i) cells[i] = 0;
  for (int64_t n = 0; n < count; ++n)
    gate_inputs(a, a.x + (begin + n) * a.x_n, static_cast<T*>(nullptr), rows + n * width);
  for (int64_t k = 0; k < a.steps; ++k) {
    const int64_t t = a.reverse ? a.steps - 1 - k : k;
    for (int64_t n = 0; n < count; ++n) copy_row(rows + n * width, a.x + (begin + n) * a.x_n + t * a.x_t, a.inputs);
    product(count, rows, width, a.weight, z, a.columns);
    for (int64_t n = 0; n < count; ++n) {
      T* const state = rows + n * width + a.inputs;
      forward_row<T, C>(H, z + n * a.columns, state, cells + n * H);
      copy_row(a.y + (begin + n) * a.y_n + t * a.y_t, state, H);
    }
  }
}

// The slopes of one time step of one sample.  `gates` has the gates before their functions, and gets their slopes: with
// respect to the cotangent of the state, or, for the first three gates of an LSTM, to that of the cell.  `keep`: the
// share of the cell (LSTM) or state (GRU) one step earlier that is kept; `through`: the slope from an LSTM's cell to
// its state; `before`: the state one step earlier; `cell`: moves on by one step; `scratch`: 5 H numbers.
template <class T, Cell C>
GK_INLINE void slope_row(int64_t H, T* gates, const T* before, T* cell, T* keep, T* through, T* scratch) {
  T *const d = scratch, *const state = scratch + 4 * H;
  T *const g1 = gates + H, *const g2 = gates + 2 * H, *const g3 = gates + 3 * H;
  apply<Fn::sigmoid>(2 * H, gates, d);
  if constexpr (C == Cell::Gru) {
    for (int64_t i = 0; i < H; ++i) g2[i] += gates[i] * g3[i];
    apply<Fn::tanh>(H, g2, d + 2 * H);
#pragma GCC ivdep
    for (int64_t i = 0; i < H; ++i) {
      const T r = gates[i], u = g1[i], n = g2[i], along = g3[i], slope = (T(1) - u) * d[2 * H + i];
      gates[i] = slope * along * d[i];
      g1[i] = (before[i] - n) * d[H + i];
      g2[i] = slope;
      g3[i] = slope * r;
      keep[i] = u;
    }
  } else {
    apply<Fn::tanh>(H, g2, d + 2 * H);
    apply<Fn::sigmoid>(H, g3, d + 3 * H);
#pragma GCC ivdep
    for (int64_t i = 0; i < H; ++i) {
      const T in = gates[i], f = g1[i], g = g2[i], earlier = cell[i];
      state[i] = cell[i] = f * earlier + in * g;
      gates[i] = g * d[i];
      g1[i] = earlier * d[H + i];
      g2[i] = in * d[2 * H + i];
      keep[i] = f;
    }
    apply<Fn::tanh>(H, state, through);
#pragma GCC ivdep
    for (int64_t i = 0; i < H; ++i) {
      through[i] *= g3[i];
      g3[i] = state[i] * d[3 * H + i];
    }
  }
}

// The slopes of the steps first … first + count - 1 of some samples, [n][count][columns], and `keep` and `through`,
// [n][count][2][H].
template <class T, Cell C>
void slopes(const RecurrentArgs<T>& a, int64_t begin, int64_t end, int64_t first, int64_t count, T* gates, T* factors,
            T* rows, T* cell, T* scratch) {
  const int64_t H = a.hidden, width = a.width();
  const auto state = [&](int64_t n, int64_t t) -> const T* {
    return t < 0 || t >= a.steps ? nullptr : a.y + n * a.y_n + t * a.y_t;
  };
  if constexpr (C == Cell::Tanh || C == Cell::Relu) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t k = 0; k < count; ++k, gates += a.columns) {
        const T* const y = state(n, first + k);
        for (int64_t i = 0; i < H; ++i) gates[i] = C == Cell::Tanh ? T(1) - y[i] * y[i] : y[i] > T(0) ? T(1) : T(0);
      }
    return;
  }
  const int64_t earlier = a.reverse ? 1 : -1;
  for (int64_t n = begin, row = 0; n < end; ++n)
    for (int64_t t = first; t < first + count; ++t, ++row)
      gate_inputs(a, a.x + n * a.x_n + t * a.x_t, state(n, t + earlier), rows + row * width);
  product((end - begin) * count, rows, width, a.weight, gates, a.columns);
  for (int64_t n = 0; n < end - begin; ++n) {
    for (int64_t i = 0; i < H; ++i) cell[i] = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = n * count + (a.reverse ? count - 1 - k : k);
      T* const factor = factors + row * 2 * H;
      slope_row<T, C>(H, gates + row * a.columns, rows + row * width + a.inputs, cell, factor, factor + H, scratch);
    }
  }
}

// One time step back of one row.  `g` is the cotangent from outside, `later` that from the following step, `carry` that
// of the cell (LSTM) or of the state (GRU).  The cotangent of a gate is its slope times the cotangent of the state; in
// an LSTM, times that of the cell for all gates but the last.
template <class T, Cell C>
GK_INLINE void step_row(int64_t H, const T* g, const T* later, T* carry, T* gates, const T* slopes, const T* keep,
                        const T* through) {
#pragma GCC ivdep
  for (int64_t i = 0; i < H; ++i) {
    T h = g[i] + later[i];
    if constexpr (C == Cell::Gru) {
      h += carry[i];
      for (int k = 0; k < 4; ++k) gates[k * H + i] = h * slopes[k * H + i];
      carry[i] = h * keep[i];
    } else if constexpr (C == Cell::Lstm) {
      const T c = carry[i] + h * through[i];
      for (int k = 0; k < 3; ++k) gates[k * H + i] = c * slopes[k * H + i];
      gates[3 * H + i] = h * slopes[3 * H + i];
      carry[i] = c * keep[i];
    } else {
      gates[i] = h * slopes[i];
    }
  }
}

// How many steps of the walk back pass before a cotangent is other than zero.  None if a state is not finite there,
// or a weight anywhere: then zero times a slope may be NaN.
template <class T>
int64_t idle_steps(const RecurrentArgs<T>& a, int64_t begin, int64_t end) {
  for (int64_t k = 0; k < (a.finite ? a.steps : 0); ++k) {
    const int64_t t = a.reverse ? k : a.steps - 1 - k;
    for (int64_t n = begin; n < end; ++n) {
      const T* const y = a.y + n * a.y_n + t * a.y_t;
      T infinite = 0;
      for (int64_t i = 0; i < a.hidden; ++i) infinite += y[i] * T(0);
      if (infinite != T(0)) return 0;
    }
    for (int64_t n = begin; n < end; ++n)
      for (int64_t s = 0; s < a.seeds; ++s) {
        const T* const g = a.g + n * a.g_n + s * a.g_s + t * a.g_t;
        for (int64_t i = 0; i < a.hidden; ++i)
          if (g[i] != T(0)) return k;
      }
  }
  return a.finite ? a.steps : 0;
}

template <class T, Cell C>
void walk_back(const RecurrentArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t H = a.hidden, width = a.gates * H, samples = end - begin, rows = samples * a.seeds;
  const int64_t idle = idle_steps(a, begin, end), count = a.steps - idle, first = a.reverse ? idle : 0;
  T *const scratch = a.scratch, *const gates = scratch + 5 * H, *const sent = gates + rows * width,
           *const carry = sent + rows * a.row;
  T *const slope = carry + rows * H, *const factors = slope + samples * count * a.columns;
  T* const inputs = factors + samples * count * 2 * H;
  slopes<T, C>(a, begin, end, first, count, slope, factors, inputs, carry, scratch);
  for (int64_t i = 0; i < rows * (a.row + H); ++i) sent[i] = 0;
  for (int64_t k = 0; k < a.steps; ++k) {
    const int64_t t = a.reverse ? k : a.steps - 1 - k;
    if (k >= idle) {
      for (int64_t n = 0, row = 0; n < samples; ++n)
        for (int64_t s = 0; s < a.seeds; ++s, ++row) {
          const int64_t at = n * count + t - first;
          const T* const factor = factors + at * 2 * H;
          step_row<T, C>(H, a.g + (begin + n) * a.g_n + s * a.g_s + t * a.g_t, sent + row * a.row, carry + row * H,
                         gates + row * width, slope + at * a.columns, factor, factor + H);
        }
      product(rows, gates, width, a.weight_t, sent, a.row);
    }
    for (int64_t row = 0; row < rows; ++row) {
      T* const to = a.result + ((begin * a.seeds + row) * a.steps + t) * a.inputs;
      const T* const from = sent + row * a.row + H;
      if (a.add)
        for (int64_t i = 0; i < a.inputs; ++i) to[i] += from[i];
      else copy_row(to, from, a.inputs);
    }
  }
}

template <Cell C>
struct CellOf {
  static constexpr Cell value = C;
};

// f(CellOf<C>()) for the cell that is known at run time.
template <class F>
GK_INLINE void for_cell(Cell cell, const F& f) {
  switch (cell) {
    case Cell::Tanh: return f(CellOf<Cell::Tanh>());
    case Cell::Relu: return f(CellOf<Cell::Relu>());
    case Cell::Gru: return f(CellOf<Cell::Gru>());
    case Cell::Lstm: return f(CellOf<Cell::Lstm>());
  }
}

}  // namespace

template <class T>
void run_recurrent(const RecurrentArgs<T>& a, int64_t begin, int64_t end) {
  for_cell(a.cell, [&](auto cell) { forward<T, decltype(cell)::value>(a, begin, end); });
}

template <class T>
void run_recurrent_vjp(const RecurrentArgs<T>& a, int64_t begin, int64_t end) {
  for_cell(a.cell, [&](auto cell) { walk_back<T, decltype(cell)::value>(a, begin, end); });
}
