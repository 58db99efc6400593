// Records where a chain meets the caller's tensors: inputs, outputs, seeds and results.  Included by body.h.

// [C][H][W] of the caller → channels-last interior.
template <class T>
void run_load(const Op& op, Context<T>& ctx, int64_t n) {
  const T* x = ctx.inputs[op.ext] + n * ctx.input_n[op.ext];
  T* y = GK_DST(n);
  for (int64_t h = 0; h < op.H; ++h) {
    T* yr = y + h * op.dst_row;
    if (op.C == 1 || op.W * op.H == 1) {  // row-major and channels-last agree
      __builtin_memcpy(yr, x + h * op.W, op.W * op.C * sizeof(T));
      continue;
    }
    for (int64_t c = 0; c < op.C; ++c) {
      const T* xc = x + (c * op.H + h) * op.W;
      for (int64_t w = 0; w < op.W; ++w) yr[w * op.dst_px + c] = xc[w];
    }
  }
}

template <class T>
void run_store(const Op& op, Context<T>& ctx, int64_t n) {
  const T* x = GK_SRC(n);
  T* y = ctx.outputs[op.ext] + n * ctx.output_n[op.ext];
  for (int64_t h = 0; h < op.H; ++h)
    for (int64_t c = 0; c < op.C; ++c)
      for (int64_t w = 0; w < op.W; ++w) y[(c * op.H + h) * op.W + w] = x[h * op.src_row + w * op.src_px + c];
}

// The rows of the last weight, copied where they are not consumed directly.
template <class T>
void run_seed_rows(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    __builtin_memcpy(GK_DST(n) + s * op.dst_s, ctx.seed_rows + n * ctx.seed_rows_n + s * ctx.seed_rows_s,
                     op.size * sizeof(T));
}

template <class T>
void run_seed_onehot(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    const int64_t t = ctx.targets[n * ctx.target_n + s], q = t % (op.H * op.W);
    GK_DST(n)[s * op.dst_s + (q / op.W) * op.dst_row + (q % op.W) * op.dst_px + t / (op.H * op.W)] = T(1);
  }
}

template <class T>
void run_seed_dense(const Op& op, Context<T>& ctx, int64_t n) {
  const int64_t size = op.C * op.H * op.W;
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    const T* g = ctx.cotangents[op.ext] + (n * ctx.seeds_total + s) * size;
    T* y = GK_DST(n) + s * op.dst_s;
    for (int64_t c = 0; c < op.C; ++c)
      for (int64_t h = 0; h < op.H; ++h)
        for (int64_t w = 0; w < op.W; ++w) y[h * op.dst_row + w * op.dst_px + c] += *g++;
  }
}

// The cotangent of an input → the caller's [C][H][W].
template <class T>
void run_store_t(const Op& op, Context<T>& ctx, int64_t n) {
  const int64_t size = op.C * op.H * op.W;
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    const T* g = GK_SRC(n) + s * op.src_s;
    T* y = ctx.results[op.ext] + (n * ctx.seeds_total + s) * size;
    for (int64_t h = 0; h < op.H; ++h) {
      if (op.fold > 1) {  // storage rows are interleaved `fold` at a time; Hi, Wi are the halo
        const int64_t row = h + op.Hi, step = op.fold * op.C;
        const T* gr = g + row / op.fold * op.fold * op.src_row + op.Wi * step + row % op.fold * op.C;
        for (int64_t c = 0; c < op.C; ++c)
          for (int64_t w = 0; w < op.W; ++w) y[(c * op.H + h) * op.W + w] = gr[w * step + c];
        continue;
      }
      const T* gr = g + h * op.src_row;
      if (op.C == 1 || op.W * op.H == 1) {  // channels-last and row-major agree
        __builtin_memcpy(y + h * op.W, gr, op.W * op.C * sizeof(T));
        continue;
      }
      for (int64_t c = 0; c < op.C; ++c)
        for (int64_t w = 0; w < op.W; ++w) y[(c * op.H + h) * op.W + w] = gr[w * op.src_px + c];
    }
  }
}
