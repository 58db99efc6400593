// Records that read or write the caller's tensors: inputs, outputs, seeds and results.  Included by body.h.

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
    for (int64_t c = 0; c < C; ++c) {
      const T* xc = x + (c * H + h) * W;
      for (int64_t w = 0; w < W; ++w) yr[w * op.dst.position + c] = xc[w];
    }
  }
}

template <class T>
void run_store(const StoreRecord& op, Context<T>& ctx, int64_t n) {
  if (!ctx.outputs) return;  // another thread's
  const auto [C, H, W] = op.extent;
  const T* x = at(ctx, op.src, n);
  T* y = ctx.outputs[op.output] + n * ctx.output_n[op.output];
  for (int64_t h = 0; h < H; ++h)
    for (int64_t c = 0; c < C; ++c)
      for (int64_t w = 0; w < W; ++w) y[(c * H + h) * W + w] = x[h * op.src.row + w * op.src.position + c];
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
    const int64_t t = ctx.targets[n * ctx.target_n + seed_number(ctx, s)], q = t % (H * W);
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
    for (int64_t c = 0; c < C; ++c)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t w = 0; w < W; ++w) y[h * op.dst.row + w * op.dst.position + c] += *g++;
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
    for (int64_t c = 0; c < C; ++c) {  // spans are whole positions
      T* yc = y + (c * H + h) * W + first / C;
      for (int64_t w = 0; w < count / C; ++w) yc[w] = gr[w * C + c];
    }
  });
}

// The cotangent of an input → the caller's [C][H][W].
template <class T>
void run_store_t(const StoreTRecord& op, Context<T>& ctx, int64_t n) {
  const auto [C, H, W] = op.extent;
  const int64_t size = C * H * W;
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    const T* g = at(ctx, op.src, n) + s * op.src.seed;
    T* y = ctx.results[op.result] + (n * ctx.seeds_total + seed_number(ctx, s)) * size;
    if (ctx.area) {
      store_spans(op, ctx, g, y);
      continue;
    }
    for (int64_t h = 0; h < H; ++h) {
      if (op.fold > 1) {  // storage rows are interleaved `fold` at a time
        const int64_t row = h + op.halo_rows, step = op.fold * C;
        const T* gr = g + row / op.fold * op.fold * op.src.row + op.halo_columns * step + row % op.fold * C;
        for (int64_t c = 0; c < C; ++c)
          for (int64_t w = 0; w < W; ++w) y[(c * H + h) * W + w] = gr[w * step + c];
        continue;
      }
      const T* gr = g + h * op.src.row;
      if (C == 1 || W * H == 1) {  // channels-last and row-major agree
        __builtin_memcpy(y + h * W, gr, W * C * sizeof(T));
        continue;
      }
      for (int64_t c = 0; c < C; ++c)
        for (int64_t w = 0; w < W; ++w) y[(c * H + h) * W + w] = gr[w * op.src.position + c];
    }
  }
}
