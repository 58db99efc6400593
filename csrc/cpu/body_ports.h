// Records that read or write the caller's tensors: inputs, outputs, seeds and results.  Included by body.h.

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GK_SHUFFLES 1
#endif
#endif

#ifdef GK_SHUFFLES
// a0 b0 a1 b1 …, from the lower halves (First = 0) or the upper ones (First = VL / 2).
template <class T, int First, int... I>
GK_INLINE Vec<T> interleaved(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * Simd<T>::VL)...);
}

// y[r][c] (+)= x[c][r] for VL × VL numbers: interleaving the halves log2(VL) times transposes them.
template <class T, bool Add>
GK_INLINE void transpose_block(const T* x, int64_t dx, T* y, int64_t dy) {
  constexpr int VL = Simd<T>::VL;
  constexpr auto order = std::make_integer_sequence<int, VL>{};
  Vec<T> a[VL], b[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) a[i] = load<T>(x + i * dx);
#pragma GCC unroll 4
  for (int length = 1; length < VL; length *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < VL / 2; ++i) {
      b[2 * i] = interleaved<T, 0>(a[i], a[i + VL / 2], order);
      b[2 * i + 1] = interleaved<T, VL / 2>(a[i], a[i + VL / 2], order);
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) store<T>(y + i * dy, Add ? load<T>(y + i * dy) + a[i] : a[i]);
}
#endif

// y[r][c] (+)= x[c][r]; dx, dy: from row to row.
template <class T, bool Add = false>
void copy_transposed(const T* x, int64_t dx, T* y, int64_t dy, int64_t rows, int64_t columns) {
  constexpr int VL = Simd<T>::VL;
  const auto part = [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t c = c0; c < c1; ++c) y[r * dy + c] = Add ? y[r * dy + c] + x[c * dx + r] : x[c * dx + r];
  };
#ifdef GK_SHUFFLES
  const int64_t whole_rows = rows / VL * VL, whole_columns = columns / VL * VL;
  for (int64_t r = 0; r < whole_rows; r += VL)
    for (int64_t c = 0; c < whole_columns; c += VL) transpose_block<T, Add>(x + c * dx + r, dx, y + r * dy + c, dy);
#else
  const int64_t whole_rows = 0, whole_columns = 0;
#endif
  part(0, whole_rows, whole_columns, columns);
  part(whole_rows, rows, 0, columns);
}

// [C][H][W] of the caller → channels-last interior.
template <class T>
void run_load(const LoadRecord& op, Context<T>& ctx, int64_t n) {
  const auto [C, H, W] = op.extent;
  const T* x = ctx.inputs[op.input] + n * ctx.input_n[op.input];
  T* y = at(ctx, op.dst, n);
  for (int64_t h = 0; h < H; ++h) {
    T* yr = y + h * op.dst.row;
    if (C == 1 || W * H == 1) {  // row-major and channels-last agree
      __builtin_memcpy(yr, x + h * W, W * C * sizeof(T));
      continue;
    }
    copy_transposed<T>(x + h * W, H * W, yr, op.dst.position, W, C);
  }
}

template <class T>
void run_store(const StoreRecord& op, Context<T>& ctx, int64_t n) {
  if (!ctx.outputs) return;  // another thread's
  const auto [C, H, W] = op.extent;
  const T* x = at(ctx, op.src, n);
  T* y = ctx.outputs[op.output] + n * ctx.output_n[op.output];
  for (int64_t h = 0; h < H; ++h) copy_transposed<T>(x + h * op.src.row, op.src.position, y + h * W, H * W, C, W);
}

// The rows of the last weight, copied if they are not consumed directly.
template <class T>
void run_seed_rows(const SeedRowsRecord& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    __builtin_memcpy(at(ctx, op.dst, n) + s * op.dst.seed, ctx.seed_rows + n * ctx.seed_rows_n + s * ctx.seed_rows_s,
                     op.elements * sizeof(T));
}

template <class T>
void run_seed_onehot(const SeedOneHotRecord& op, Context<T>& ctx, int64_t n) {
  const int64_t H = op.extent.H, W = op.extent.W;
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    const int64_t t = ctx.targets[n * ctx.target_n + seed_index(ctx, s)], q = t % (H * W);
    at(ctx, op.dst, n)[s * op.dst.seed + (q / W) * op.dst.row + (q % W) * op.dst.position + t / (H * W)] = T(1);
  }
}

template <class T>
void run_seed_dense(const SeedDenseRecord& op, Context<T>& ctx, int64_t n) {
  const auto [C, H, W] = op.extent;
  const int64_t size = C * H * W;
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    const T* g = ctx.cotangents[op.cotangent] + (n * ctx.seeds_total + s) * size;
    T* y = at(ctx, op.dst, n) + s * op.dst.seed;
    for (int64_t h = 0; h < H; ++h)
      copy_transposed<T, true>(g + h * W, H * W, y + h * op.dst.row, op.dst.position, W, C);
  }
}

// The cotangent of an input → the caller's [C][H][W], from the spans of an area; zeros elsewhere.
template <class T>
void store_spans(const StoreTRecord& op, const Context<T>& ctx, const T* g, T* y) {
  const int64_t C = op.extent.C, H = op.extent.H, W = op.extent.W;  // older clangs capture no structured bindings
  __builtin_memset(y, 0, C * H * W * sizeof(T));
  for_spans(ctx, 0, 0, [&](int64_t h, int64_t first, int64_t count) {
    const T* gr = g + h * op.src.row + first;
    if (C == 1 || W * H == 1) {
      __builtin_memcpy(y + h * W + first, gr, count * sizeof(T));
      return;
    }
    copy_transposed<T>(gr, C, y + h * W + first / C, H * W, C, count / C);  // spans are whole positions
  });
}

// The cotangent of an input → the caller's [C][H][W].
template <class T>
void run_store_t(const StoreTRecord& op, Context<T>& ctx, int64_t n) {
  const auto [C, H, W] = op.extent;
  const int64_t size = C * H * W;
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    const T* g = at(ctx, op.src, n) + s * op.src.seed;
    T* y = ctx.results[op.result] + (n * ctx.seeds_total + seed_index(ctx, s)) * size;
    if (ctx.area) {
      store_spans(op, ctx, g, y);
      continue;
    }
    for (int64_t h = 0; h < H; ++h) {
      if (op.fold > 1) {  // storage rows are interleaved `fold` at a time
        const int64_t row = h + op.halo_rows, step = op.fold * C;
        const T* gr = g + row / op.fold * op.fold * op.src.row + op.halo_columns * step + row % op.fold * C;
        copy_transposed<T>(gr, step, y + h * W, H * W, C, W);
        continue;
      }
      const T* gr = g + h * op.src.row;
      if (C == 1 || W * H == 1) {  // channels-last and row-major agree
        __builtin_memcpy(y + h * W, gr, W * C * sizeof(T));
        continue;
      }
      copy_transposed<T>(gr, op.src.position, y + h * W, H * W, C, W);
    }
  }
}
