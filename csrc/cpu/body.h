// The chain interpreter: one function per record kind, compiled once per ISA.
#include "simd.h"
#include "tiles.h"

namespace {

// A buffer of one sample: interior rows of `row` elements apart, W positions of C contiguous channels.
#define GK_SRC(n) (ctx.buf + op.src + (n) * op.src_n)
#define GK_DST(n) (ctx.buf + op.dst + (n) * op.dst_n)

// ---- forward -------------------------------------------------------------------------------------------------

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
      const int64_t nv = (vectors - v + tiles - 1) / tiles;  // even tiles, as gradkern/pack.py lays them out
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

// ReLU, max pool, or both, as bits: plane j of output q holds the channels whose maximum is alive and came from
// tap j.

// One output position and 16 channels, any window: x(j) gives tap j's address or null outside the input.
template <class T, class Tap>
GK_INLINE void pattern16(const Op& op, int64_t c, const Tap& tap, T* y, uint8_t* planes) {
  constexpr int VL = Simd<T>::VL;
  const int64_t left = op.C - c < 16 ? op.C - c : 16;
  uint16_t wins[256];
  T m[16];
  int64_t first = -1;
  for (int64_t i = 0; i < 16; ++i) m[i] = -__builtin_inff();
  for (int64_t j = 0; j < op.taps; ++j) {
    const T* x = tap(j);
    wins[j] = 0;
    if (!x) continue;
    const uint32_t k = better16<T>(x + c, m);
    wins[j] = static_cast<uint16_t>(k);
    if (first < 0) first = j;
    for (int64_t i = 0; i < 16; ++i) m[i] = (k >> i) & 1 ? x[c + i] : m[i];
  }
  uint32_t open = (1u << left) - 1;
  if (op.relu) {
    open &= alive16<T>(m);
    for (int v = 0; v < 16; v += VL) {
      const Vec<T> x = load<T>(m + v);
      store<T>(m + v, keep<T>(x, ~(x <= Vec<T>{})));
    }
  }
  // The last replacement won; where nothing ever beat -inf, the first tap did.
  uint32_t dead = ~open;
  for (int64_t j = op.taps - 1; j >= 0; --j) {
    uint32_t k = wins[j] & ~dead;
    dead |= k;
    if (j == first) k |= ~dead & 0xffff;
    const uint16_t word = static_cast<uint16_t>(k);
    __builtin_memcpy(planes + j * op.nb + c / 8, &word, 2);
  }
  __builtin_memcpy(y + c, m, left * sizeof(T));
}

#if GK_ISA == 512
// The same for float windows of at most four taps that lie inside: everything in registers.
template <int Taps>
GK_INLINE void pattern_inside(const Op& op, const float* const* taps, float* y, uint8_t* planes) {
  for (int64_t c = 0; c < op.C; c += 16) {
    const __mmask16 lanes = op.C - c < 16 ? (__mmask16)((1u << (op.C - c)) - 1) : (__mmask16)0xffff;
    __mmask16 win[Taps];
    __m512 m = _mm512_maskz_loadu_ps(lanes, taps[0] + c);
    win[0] = 0xffff;
#pragma GCC unroll 4
    for (int j = 1; j < Taps; ++j) {
      const __m512 x = _mm512_maskz_loadu_ps(lanes, taps[j] + c);
      win[j] = _mm512_cmp_ps_mask(x, m, _CMP_GT_OQ) | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      m = _mm512_mask_mov_ps(m, win[j], x);
    }
    __mmask16 open = lanes;
    if (op.relu) {
      open &= _mm512_cmp_ps_mask(m, _mm512_setzero_ps(), _CMP_NLE_UQ);
      m = _mm512_maskz_mov_ps(open, m);
    }
#pragma GCC unroll 4
    for (int j = Taps - 1; j >= 0; --j) {
      const uint16_t word = open & win[j];
      open &= ~win[j];
      __builtin_memcpy(planes + j * op.nb + c / 8, &word, 2);
    }
    _mm512_mask_storeu_ps(y + c, lanes, m);
  }
}
#endif

template <class T>
void run_pattern(const Op& op, Context<T>& ctx, int64_t n) {
  const T* src = GK_SRC(n);
  uint8_t* planes = ctx.bits + op.bits + n * op.bits_n;
  const T* taps[256];
  for (int64_t h = 0; h < op.H; ++h)
    for (int64_t w = 0; w < op.W; ++w, planes += op.taps * op.nb) {
      T* y = GK_DST(n) + h * op.dst_row + w * op.dst_px;
      bool inside = true;
      const T** tap = taps;
      for (int64_t jh = 0; jh < op.kh; ++jh)
        for (int64_t jw = 0; jw < op.kw; ++jw) {
          const int64_t hi = h * op.sh - op.ph + jh * op.dh, wi = w * op.sw - op.pw + jw * op.dw;
          const bool in = hi >= 0 && hi < op.Hi && wi >= 0 && wi < op.Wi;
          inside &= in;
          *tap++ = in ? src + hi * op.src_row + wi * op.src_px : nullptr;
        }
#if GK_ISA == 512
      if constexpr (sizeof(T) == 4)
        if (inside) {
          if (op.taps == 1) {
            pattern_inside<1>(op, taps, y, planes);
            continue;
          }
          if (op.taps == 2) {
            pattern_inside<2>(op, taps, y, planes);
            continue;
          }
          if (op.taps == 3) {
            pattern_inside<3>(op, taps, y, planes);
            continue;
          }
          if (op.taps == 4) {
            pattern_inside<4>(op, taps, y, planes);
            continue;
          }
        }
#endif
      for (int64_t c = 0; c < op.C; c += 16) pattern16<T>(op, c, [&](int64_t j) { return taps[j]; }, y, planes);
    }
}

template <class T, Fn F>
void scale_rows(const Op& op, const T* src, T* dst, T* slope) {
  const T p0 = static_cast<T>(__builtin_bit_cast(double, op.p0)),
          p1 = static_cast<T>(__builtin_bit_cast(double, op.p1)),
          p2 = static_cast<T>(__builtin_bit_cast(double, op.p2));
  for (int64_t h = 0; h < op.H; ++h) {
    const T* x = src + h * op.src_row;
    T *y = dst + h * op.dst_row, *d = slope + h * op.aux_row;
    const int64_t count = op.W * op.C;
#pragma GCC ivdep  // in place or apart, element i depends on element i alone
    for (int64_t i = 0; i < count; ++i) {
      const Pair<T> r = Function<F>::at(x[i], p0, p1, p2);
      y[i] = r.y;
      d[i] = r.d;
    }
  }
}

template <class T>
void run_scale(const Op& op, Context<T>& ctx, int64_t n) {
  T* slope = ctx.buf + op.aux + n * op.aux_n;
  switch (static_cast<Fn>(op.fn)) {
#define X(name) \
  case Fn::name: return scale_rows<T, Fn::name>(op, GK_SRC(n), GK_DST(n), slope);
    GRADKERN_FUNCTIONS(X)
#undef X
  }
}

template <class T>
void run_sum(const Op& op, Context<T>& ctx, int64_t n) {
  const T* b = ctx.buf + op.aux + n * op.aux_n;
  for (int64_t h = 0; h < op.H; ++h)
    for (int64_t i = 0; i < op.W * op.C; ++i)
      GK_DST(n)[h * op.dst_row + i] = GK_SRC(n)[h * op.src_row + i] + b[h * op.aux_row + i];
}

// ---- backward ------------------------------------------------------------------------------------------------

template <class T>
void run_zero(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s) __builtin_memset(GK_DST(n) + s * op.dst_s, 0, op.size * sizeof(T));
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

// The position that tap (jh, jw) of pool output (h, w) reads, or false outside.
GK_INLINE bool tap_position(const Op& op, int64_t h, int64_t w, int64_t jh, int64_t jw, int64_t& hi, int64_t& wi) {
  hi = h * op.sh - op.ph + jh * op.dh;
  wi = w * op.sw - op.pw + jw * op.dw;
  return hi >= 0 && hi < op.Hi && wi >= 0 && wi < op.Wi;
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

// A pattern applied to a dense destination: what was routed moves, the rest stays as it is.
template <class T>
void run_expand(const Op& op, Context<T>& ctx, int64_t n) {
  const uint8_t* planes = ctx.bits + op.bits + n * op.bits_n;
  for (int64_t h = 0; h < op.H; ++h)
    for (int64_t w = 0; w < op.W; ++w)
      for (int64_t jh = 0; jh < op.kh; ++jh)
        for (int64_t jw = 0; jw < op.kw; ++jw, planes += op.nb) {
          int64_t hi, wi;
          if (!tap_position(op, h, w, jh, jw, hi, wi)) continue;
          const T* g = GK_SRC(n) + h * op.src_row + w * op.src_px;
          T* y = GK_DST(n) + hi * op.dst_row + wi * op.dst_px;
          for (int64_t c = 0; c < op.C; c += 16) {
            uint16_t word;
            __builtin_memcpy(&word, planes + c / 8, 2);
            uint16_t out[32];
            const int64_t count = append(out, word, c);
            for (int64_t s = 0; s < ctx.seeds; ++s)
              for (int64_t i = 0; i < count; ++i) y[s * op.dst_s + out[i]] += g[s * op.src_s + out[i]];
          }
        }
}

// dst (+)= src · slope.  In place where the value has one reader.
template <class T>
void run_mul_d(const Op& op, Context<T>& ctx, int64_t n) {
  const T* d = ctx.buf + op.aux + n * op.aux_n;
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for (int64_t h = 0; h < op.H; ++h) {
      const T* g = GK_SRC(n) + s * op.src_s + h * op.src_row;
      T* y = GK_DST(n) + s * op.dst_s + h * op.dst_row;
      const T* dr = d + h * op.aux_row;
      if (op.assign)
        for (int64_t i = 0; i < op.W * op.C; ++i) y[i] = g[i] * dr[i];
      else
        for (int64_t i = 0; i < op.W * op.C; ++i) y[i] += g[i] * dr[i];
    }
}

template <class T>
void run_add(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s)
    for (int64_t h = 0; h < op.H; ++h) {
      const T* g = GK_SRC(n) + s * op.src_s + h * op.src_row;
      T* y = GK_DST(n) + s * op.dst_s + h * op.dst_row;
      for (int64_t i = 0; i < op.W * op.C; ++i) y[i] += g[i];
    }
}

// A cotangent without its negative part.
template <class T>
void run_rectify(const Op& op, Context<T>& ctx, int64_t n) {
  for (int64_t s = 0; s < ctx.seeds; ++s) {
    T* y = GK_DST(n) + s * op.dst_s;
    for (int64_t i = 0; i < op.size; ++i) y[i] = y[i] < T(0) ? T(0) : y[i];
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

#include "body_forms.h"
#include "body_matmul.h"

#undef GK_SRC
#undef GK_DST

template <class T>
void run_op(const Op& op, Context<T>& ctx, int64_t n) {
  switch (static_cast<Kind>(op.kind)) {
    case Kind::Load: return run_load(op, ctx, n);
    case Kind::Window: return run_window(op, ctx, n);
    case Kind::Stencil: return run_stencil(op, ctx, n);
    case Kind::Pattern: return run_pattern(op, ctx, n);
    case Kind::Scale: return run_scale(op, ctx, n);
    case Kind::Sum: return run_sum(op, ctx, n);
    case Kind::Move: return run_move(op, ctx, n);
    case Kind::Product: return run_product(op, ctx, n);
    case Kind::Lines: return run_lines(op, ctx, n);
    case Kind::Store: return run_store(op, ctx, n);
    case Kind::SeedRows: return run_seed_rows(op, ctx, n);
    case Kind::SeedOneHot: return run_seed_onehot(op, ctx, n);
    case Kind::SeedDense: return run_seed_dense(op, ctx, n);
    case Kind::Zero: return run_zero(op, ctx, n);
    case Kind::WindowT: return run_window_t(op, ctx, n);
    case Kind::StencilT: return run_stencil_t(op, ctx, n);
    case Kind::Expand: return run_expand(op, ctx, n);
    case Kind::MulD: return run_mul_d(op, ctx, n);
    case Kind::Add: return run_add(op, ctx, n);
    case Kind::MoveT: return run_move_t(op, ctx, n);
    case Kind::ProductT: return run_product_t(op, ctx, n);
    case Kind::LinesT: return run_lines_t(op, ctx, n);
    case Kind::StoreT: return run_store_t(op, ctx, n);
    case Kind::Rectify: return run_rectify(op, ctx, n);
    case Kind::MatMul: return run_matmul(op, ctx, n);
    case Kind::MatMulT: return run_matmul_t(op, ctx, n);
  }
}

// Runs of per-sample ops go sample by sample, so that a sample's chain stays in L1; block ops go at once, so that
// a weight is read once per block.
template <class T>
void run_chain(const Op* ops, int64_t count, Context<T>& ctx) {
  for (int64_t i = 0; i < count;) {
    if (ops[i].block) {
      run_op(ops[i++], ctx, 0);
      continue;
    }
    int64_t end = i;
    while (end < count && !ops[end].block) ++end;
    for (int64_t n = 0; n < ctx.samples; ++n)
      for (int64_t k = i; k < end; ++k) run_op(ops[k], ctx, n);
    i = end;
  }
}

}  // namespace
