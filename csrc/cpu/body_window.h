// Records of contractions, forward and for all seeds backward.  Included by body.h.

// Convolution, or a linear layer over all samples of the block (then positions are samples).
template <class T>
void run_window(const Op& op, Context<T>& ctx, int64_t n) {
  constexpr int VL = Simd<T>::VL;
  const int64_t rows = op.block ? 1 : op.H;
  const int64_t count = op.block ? ctx.samples : op.W;
  WindowArgs<T> a{};
  a.px = op.block ? op.src_n : op.sw * op.src_px;
  a.py = op.block ? op.dst_n : op.dst_px;
  a.rowoff = ctx.tables + op.table;
  a.R = op.R;
  a.L = op.L;
  const int64_t vectors = (op.O + VL - 1) / VL;
  for (int64_t g = 0; g < op.groups; ++g) {
    const T* w = ctx.packed + op.wf + g * op.K * vectors * VL;
    const T* bias = ctx.packed + op.bias + g * vectors * VL;
    for (int64_t v = 0, tiles = (vectors + kMaxNV - 1) / kMaxNV; v < vectors; --tiles) {
      const int64_t nv = (vectors - v + tiles - 1) / tiles;  // even tiles, as gradkern/codegen/weights.py lays them out
      a.w = w + v * VL * op.K;
      a.bias = bias + v * VL;
      a.tail = v + nv == vectors ? op.O - (vectors - 1) * VL : VL;
      for (int64_t h = 0; h < rows; ++h) {
        a.x = GK_SRC(n) + h * op.sh * op.src_row + g * op.C;
        a.y = GK_DST(n) + h * op.dst_row + g * op.O + v * VL;
        window_dispatch<T>(a, static_cast<int>(nv), count);
      }
      v += nv;
    }
  }
}

// Lists of live channels for every position that carries a cotangent.  Appends to the context's lists.
template <class T>
struct Lists {
  Context<T>& ctx;
  int64_t used = 0, segs = 0;

  GK_INLINE void close(int64_t start, int64_t src, int64_t dst) {
    ctx.segs[segs++] = Segment{src, dst, start, used - start};
  }

  // src/dst: offsets of this sample's cotangent and destination; the Window's own geometry is in `op`
  // (aux_*: rows and positions of the destination), the pattern's in `pat`.
  void from_bits(const Op& op, const uint8_t* planes, int64_t src, int64_t dst) {
    for (int64_t h = 0; h < op.H; ++h)
      for (int64_t w = 0; w < op.W; ++w)
        for (int64_t jh = 0; jh < op.kh; ++jh)
          for (int64_t jw = 0; jw < op.kw; ++jw, planes += op.nb) {
            int64_t hi, wi;
            if (!tap_position(op, h, w, jh, jw, hi, wi)) continue;
            const int64_t start = used;
            for (int64_t c = 0; c < op.O; c += 16) {
              uint16_t word;
              __builtin_memcpy(&word, planes + c / 8, 2);
              used += append(ctx.idx + used, word, c);
            }
            if (used > start)
              close(start, src + h * op.src_row + w * op.src_px, dst + hi * op.dst_row + wi * op.dst_px);
          }
  }

  // The same with one segment per pool output: the taps' weight rows are shifted copies within one window.
  void merged(const Op& op, const uint8_t* planes, int64_t src, int64_t dst) {
    for (int64_t h = 0; h < op.H; ++h)
      for (int64_t w = 0; w < op.W; ++w) {
        const int64_t start = used;
        for (int64_t j = 0; j < op.taps; ++j, planes += op.nb)
          for (int64_t c = 0; c < op.O; c += 16) {
            uint16_t word;
            __builtin_memcpy(&word, planes + c / 8, 2);
            append(ctx.rows + used, word, j * op.O + c);
            used += append(ctx.idx + used, word, c);
          }
        if (used > start) close(start, src + h * op.src_row + w * op.src_px, dst + h * op.dst_row + w * op.dst_px);
      }
  }

  // No pattern: every channel of every position, one shared list.
  void dense(const Op& op, int64_t src, int64_t dst) {
    if (segs == 0)
      for (int64_t c = 0; c < op.O; ++c) ctx.idx[used++] = static_cast<uint16_t>(c);
    for (int64_t h = 0; h < op.H; ++h)
      for (int64_t w = 0; w < op.W; ++w)
        ctx.segs[segs++] = Segment{src + h * op.src_row + w * op.src_px, dst + h * op.dst_row + w * op.dst_px, 0, op.O};
  }
};

// Transposed convolution or linear for all seeds: O is the number of output channels (all groups), C the channels
// read per group.  dst_row/dst_px are the steps of the *window's origin* per output position.
template <class T>
void run_window_t(const Op& op, Context<T>& ctx, int64_t n) {
  Lists<T> lists{ctx};
  const int64_t last = op.block ? ctx.samples : n + 1;
  for (int64_t m = op.block ? 0 : n; m < last; ++m) {
    const int64_t src = op.rows ? m * ctx.seed_rows_n : op.src + m * op.src_n;
    const int64_t dst = op.dst + m * op.dst_n;
    if (!op.taps) {
      lists.dense(op, src, dst);
      continue;
    }
    const int64_t before = lists.segs;
    if (op.merged) lists.merged(op, ctx.bits + op.bits + m * op.bits_n, src, dst);
    else lists.from_bits(op, ctx.bits + op.bits + m * op.bits_n, src, dst);
    if (op.assign && lists.segs == before) lists.close(lists.used, src, dst);  // all dead: still write zeros
  }
  ScatterArgs<T> a{};
  a.idx = ctx.idx;
  a.rows = op.merged ? ctx.rows : ctx.idx;
  a.g = op.rows ? ctx.seed_rows : ctx.buf;
  a.gs = op.rows ? ctx.seed_rows_s : op.src_s;
  a.out = ctx.buf;
  a.os = op.dst_s;
  a.w = ctx.packed + op.wb;
  a.ldw = op.ldw;
  a.slots = ctx.tables + op.table2;
  a.assign = op.assign;
  if (op.groups > 1) {  // lists are sorted by channel: cut them at the groups' borders
    const int64_t per = op.O / op.groups;
    for (int64_t k = 0; k < lists.segs; ++k) {
      Segment seg = ctx.segs[k];
      for (int64_t end = seg.start + seg.count; seg.start < end; seg.start += seg.count) {
        const int64_t g = ctx.idx[seg.start] / per;
        for (seg.count = 1; seg.start + seg.count < end && ctx.idx[seg.start + seg.count] / per == g;) ++seg.count;
        seg.dst = ctx.segs[k].dst + g * op.C;
        a.segs = &seg;
        a.nsegs = 1;
        scatter<T>(a, ctx.seeds, op.slots);
      }
    }
    return;
  }
  for (int64_t k = 0; k < lists.segs; k += op.outer) {
    a.segs = ctx.segs + k;
    a.nsegs = lists.segs - k < op.outer ? lists.segs - k : op.outer;
    scatter<T>(a, ctx.seeds, op.slots);
  }
}
