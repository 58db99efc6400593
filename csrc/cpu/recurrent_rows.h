// The walk of a recurrent layer back through time for all seeds; included once per ISA, like body.h.

namespace {

// c [rows][row] = a [rows][width] · b [width][row], R rows and P vectors at a time.
template <class T, int R, int P>
GK_INLINE void product_tile(const T* a, int64_t width, const T* b, int64_t row, T* c) {
  constexpr int VL = Simd<T>::VL;
  Vec<T> sums[R][P] = {};
  for (int64_t k = 0; k < width; ++k) {
    Vec<T> w[P];
    for (int p = 0; p < P; ++p) w[p] = load(b + k * row + p * VL);
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = bcast(a[r * width + k]);
      for (int p = 0; p < P; ++p) sums[r][p] += x * w[p];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) store(c + r * row + p * VL, sums[r][p]);
}

template <class T, int P>
void product_columns(int64_t rows, const T* a, int64_t width, const T* b, int64_t row, T* c) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) product_tile<T, 4, P>(a + r * width, width, b, row, c + r * row);
  for (; r < rows; ++r) product_tile<T, 1, P>(a + r * width, width, b, row, c + r * row);
}

template <class T>
void product(int64_t rows, const T* a, int64_t width, const T* b, int64_t row, T* c) {
  constexpr int VL = Simd<T>::VL, P = GK_REGISTERS >= 32 ? 4 : 2;
  int64_t at = 0;
  for (; at + P * VL <= row; at += P * VL) product_columns<T, P>(rows, a, width, b + at, row, c + at);
  for (; at + 2 * VL <= row; at += 2 * VL) product_columns<T, 2>(rows, a, width, b + at, row, c + at);
  for (; at < row; at += VL) product_columns<T, 1>(rows, a, width, b + at, row, c + at);
}

// One time step of one row.  `g` is the cotangent from outside, `later` that from the following step, `carry` that of
// the cell (LSTM) or of the state (GRU).  The cotangent of a gate is its slope times the cotangent of the state; in an
// LSTM, times that of the cell for all gates but the last.
template <class T, Cell C>
GK_INLINE void step_row(int64_t H, const T* g, const T* later, T* carry, T* gates, const T* slopes, const T* keep,
                        const T* through) {
#pragma GCC ivdep
  for (int64_t i = 0; i < H; ++i) {
    T h = g[i] + later[i];
    if constexpr (C == Cell::Plain) {
      gates[i] = h * slopes[i];
    } else if constexpr (C == Cell::Gru) {
      h += carry[i];
      for (int k = 0; k < 4; ++k) gates[k * H + i] = h * slopes[k * H + i];
      carry[i] = h * keep[i];
    } else {
      const T c = carry[i] + h * through[i];
      for (int k = 0; k < 3; ++k) gates[k * H + i] = c * slopes[k * H + i];
      gates[3 * H + i] = h * slopes[3 * H + i];
      carry[i] = c * keep[i];
    }
  }
}

template <class T, Cell C>
void walk(const RecurrentArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t H = a.hidden, width = a.gates * H, rows = (end - begin) * a.seeds;
  T *const gates = a.scratch, *const sent = gates + rows * width, *const carry = sent + rows * a.row;
  for (int64_t i = 0; i < rows * (a.row + H); ++i) sent[i] = 0;
  for (int64_t k = 0; k < a.steps; ++k) {
    const int64_t t = a.reverse ? k : a.steps - 1 - k;
    for (int64_t n = begin, row = 0; n < end; ++n)
      for (int64_t s = 0; s < a.seeds; ++s, ++row) {
        const int64_t at = n * a.steps + t;
        step_row<T, C>(H, a.g + n * a.g_n + s * a.g_s + t * a.g_t, sent + row * a.row, carry + row * H,
                       gates + row * width, a.slopes + at * width, a.keep + at * H, a.through + at * H);
      }
    product(rows, gates, width, a.weight, a.row, sent);
    for (int64_t row = 0; row < rows; ++row) {
      T* const to = a.result + ((begin * a.seeds + row) * a.steps + t) * a.inputs;
      for (int64_t i = 0; i < a.inputs; ++i) to[i] = sent[row * a.row + H + i];
    }
  }
}

}  // namespace

template <class T>
void run_recurrent(const RecurrentArgs<T>& a, int64_t begin, int64_t end) {
  switch (a.cell) {
    case Cell::Plain: return walk<T, Cell::Plain>(a, begin, end);
    case Cell::Gru: return walk<T, Cell::Gru>(a, begin, end);
    case Cell::Lstm: return walk<T, Cell::Lstm>(a, begin, end);
  }
}
