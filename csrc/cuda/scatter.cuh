// Transposed contractions for all seeds.
//
// Convolutions: a worker (a warp, or an even part of one) processes one position after another.  It reads the live
// channels from the bits, and adds each channel's weights, times the seeds' cotangents, to the window.  Zeros of the
// pattern cost nothing, and one walk serves all seeds.  Windows overlap, so workers own bands of positions: bands of
// one colour touch disjoint memory (gradkern/codegen/cuda/clock_model.py chooses their size), and a barrier separates
// the colours.
//
// Linear layers take all samples and seeds of the tile at once: a dense matrix product, each weight read once.
#pragma once
#include "device.cuh"

namespace gradkern::cuda {

// Channels c0 … c0 + 31 of a plane that are alive and lie in [low, high).
GK_DEVICE uint32_t live_word(const uint8_t* plane, int plane_bytes, int c0, int low, int high) {
  uint32_t word = 0xffffffffu;
  if (plane) {
    word = half_word(plane + c0 / 8);
    if (c0 / 8 + 2 < plane_bytes) word |= half_word(plane + c0 / 8 + 2) << 16;
  }
  if (c0 < low) word &= 0xffffffffu << (low - c0);
  if (high - c0 < 32) word &= (1u << (high - c0)) - 1;
  return word;
}

// The start of each seed's cotangents; seeds past the last repeat the last one, and are not stored.
template <class T, int S>
GK_DEVICE void seed_starts(const T* (&from)[S], const T* g, int stride, int seeds) {
#pragma unroll
  for (int s = 0; s < S; ++s) from[s] = g + (s < seeds ? s : seeds - 1) * stride;
}

// One walk: out[s][e] += Σ_j Σ_{c live in plane j} g[s][c] · w[j][c][e], for this lane's elements e of the window.
// Several planes are the taps of a pool that share one window.
template <class T, int NV, int S>
GK_DEVICE void walk(const uint8_t* plane, int plane_bytes, int planes, int channels, int low, int high, const T* g,
                    int stride, int seeds, const T* w, int row_length, int lanes, T* out, int out_seed,
                    const int (&offset)[NV]) {
  const T* from[S];
  seed_starts(from, g, stride, seeds);
  T acc[S][NV] = {};
  bool any = false;
  for (int j = 0; j < planes; ++j, w += channels * row_length)
    for (int c0 = low & ~31; c0 < high; c0 += 32) {
      uint32_t word = live_word(plane ? plane + j * plane_bytes : nullptr, plane_bytes, c0, low, high);
      any |= word != 0;
      for (; word; word &= word - 1) {
        const int c = c0 + __ffs(static_cast<int>(word)) - 1;
        T ws[NV];
#pragma unroll
        for (int v = 0; v < NV; ++v) ws[v] = fixed(w + c * row_length + v * lanes);
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const T gs = from[s][c];
#pragma unroll
          for (int v = 0; v < NV; ++v) acc[s][v] += gs * ws[v];
        }
      }
    }
  if (!any) return;
#pragma unroll
  for (int v = 0; v < NV; ++v)
    if (offset[v] >= 0)
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (s < seeds) out[s * out_seed + offset[v]] += acc[s][v];
}

// One position, or one of its pool taps, as a worker visits it.
template <class T>
struct Visit {
  bool inside;           // false: no position, but the lanes still take part
  const uint8_t* plane;  // bits of what is alive, or null: all channels
  const T* from;         // cotangents [seed][channel], `stride` apart
  int stride, seeds;
  T* to;  // the start of its window
};

// Visits every position once for every group of `together` seeds, band by band of one colour.  All lanes of a warp make
// the same number of visits.  `Rows`: whether cotangents may be the seed rows, in global memory; otherwise the compiler
// knows that they are shared.
template <bool Rows, class T, class Each>
GK_DEVICE void over_bands(const ScatterTRecord& op, const Tile<T>& t, int lanes, int together, const Each& each) {
  const PatternRef& pattern = op.pattern;
  const int H = op.H, W = op.W, plane_bytes = pattern.plane_bytes, kw = pattern.taps && !op.merged ? pattern.kw : 1;
  const int all = pattern.taps ? pattern.taps : 1, taps = op.merged ? 1 : all;
  const int high = op.bands.rows, wide = op.bands.columns, row_colours = op.bands.row_colours;
  const int colours = op.bands.column_colours;
  const int down = (H + high - 1) / high, across = (W + wide - 1) / wide;
  const int seed_groups = (t.seeds + together - 1) / together, per_warp = kWarp / lanes, sub = t.lane() / lanes;
  const Divider bands_across(wide), pool_columns(kw), tap_count(taps), groups_of_seeds(seed_groups);
  for (int colour = 0; colour < row_colours * colours; ++colour) {
    const int ch = colour / colours, cw = colour - ch * colours;
    const int rows = (down + row_colours - 1 - ch) / row_colours, columns = (across + colours - 1 - cw) / colours;
    const int each_sample = rows * columns, total = t.count * seed_groups * each_sample;
    if (!total) continue;
    const Divider sample_bands(each_sample), line(columns);
    for (int base = t.warp() * per_warp; base < total; base += t.warps() * per_warp) {
      const bool active = base + sub < total;
      const auto [rest, band] = sample_bands.parts(active ? base + sub : 0);
      const auto [y, x] = line.parts(band);
      const auto [m, group] = groups_of_seeds.parts(rest);
      const int h0 = (y * row_colours + ch) * high, w0 = (x * colours + cw) * wide, s0 = group * together;
      const bool seed_rows = Rows && op.seed_rows;
      const T* from = seed_rows ? t.seed_row(m, s0) : t.at(op.src, m, s0);
      T* to = t.at(op.dst, m, s0);
      const uint8_t* bits = pattern.taps ? t.bits(pattern, m) : nullptr;
      for (int i = 0; i < high * wide * taps; ++i) {
        const auto [q, j] = tap_count.parts(i);
        const auto [down_band, along_band] = bands_across.parts(q);
        const auto [jh, jw] = pool_columns.parts(j);
        const bool there = active && h0 + down_band < H && w0 + along_band < W;
        const int h = there ? h0 + down_band : 0, w = there ? w0 + along_band : 0;
        int hi = h, wi = w;
        Visit<T> visit{};
        visit.inside = there && (!pattern.taps || op.merged || tap_position(pattern, h, w, jh, jw, hi, wi));
        visit.plane = bits ? bits + ((h * W + w) * all + j) * plane_bytes : nullptr;
        visit.from = from + Steps(op.src)(h, w);
        visit.stride = seed_rows ? t.args.seed_rows_s : op.src.seed;
        visit.seeds = t.seeds - s0 < together ? t.seeds - s0 : together;
        visit.to = to + Steps(op.dst)(hi, wi);
        each(visit);
        __syncwarp();
      }
    }
    __syncthreads();
  }
}

// Seeds of a visit: as few visits as `most` seeds at a time allow, evenly filled.
GK_DEVICE int seeds_together(int seeds, int most) {
  const int visits = (seeds + most - 1) / most;
  return (seeds + visits - 1) / visits;
}

template <bool Rows, class T, int NV, int S>
GK_DEVICE void scatter(const ScatterTRecord& op, const Tile<T>& t, int lanes) {
  const int elements = op.window_elements, plane_bytes = op.pattern.plane_bytes,
            planes = op.merged ? op.pattern.taps : 1;
  const int sublane = t.lane() % lanes, groups = op.groups, per_group = static_cast<int>(op.O) / groups;
  const int row_length = op.row_length, seed = op.dst.seed;
  const int32_t* table = t.args.tables + op.window_table;
  for (int chunk = 0; chunk < elements; chunk += lanes * NV) {
    int offset[NV];
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int k = chunk + v * lanes + sublane;
      offset[v] = k < elements ? fixed(table + k) : -1;
    }
    const T* weights = t.args.packed + op.weights + chunk + sublane;
    over_bands<Rows>(op, t, lanes, S, [&](const Visit<T>& at) {
      if (!at.inside) return;
      for (int group = 0; group < groups; ++group)
        walk<T, NV, S>(at.plane, plane_bytes, planes, op.O, group * per_group, (group + 1) * per_group, at.from,
                       at.stride, at.seeds, weights, row_length, lanes, at.to + group * static_cast<int>(op.C), seed,
                       offset);
    });
  }
}

template <class T>
GK_DEVICE void run_walk(const ScatterTRecord& op, const Tile<T>& t) {
  const int elements = op.window_elements, lanes = op.lanes;
  with_count<kWalkElements>((elements + lanes - 1) / lanes, [&]<int NV>() {
    if (op.seed_rows) return scatter<true, T, NV, kWalkSeeds<T>>(op, t, lanes);
    with_count<kWalkSeeds<T>>(seeds_together(t.seeds, kWalkSeeds<T>),
                              [&]<int S>() { scatter<false, T, NV, S>(op, t, lanes); });
  });
}

// ---- linear layers ---------------------------------------------------------------------------------------------

template <class T>
constexpr int kAhead = sizeof(T) == 4 ? 4 : 1;  // rows of the weight: 270 clocks from L2 are about two rows' work
constexpr int kColumns = 16;                    // lanes along the columns, four columns each; two lanes along the rows

// acc[r][o] += g[r] · w[o].
template <class T, int Rows>
GK_DEVICE void outer(T (&acc)[Rows][4], const T* g, const Four<T>& w) {
#pragma unroll
  for (int r = 0; r < Rows; r += 4) {
    const Four<T> gs = load4(g + r);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int o = 0; o < 4; ++o) acc[r + i][o] += gs.v[i] * w.v[o];
  }
}

// Stores a warp's part of a product: `Rows` rows per lane from r0 on, four columns from col on.
template <class T, int Rows>
GK_DEVICE void store_product(const DenseTRecord& op, const Tile<T>& t, const T (&acc)[Rows][4], int rows, int r0,
                             int col, bool assign) {
  const int columns = op.window_elements;
  const int32_t* table = t.args.tables + op.window_table;
  const bool joined = op.joined && ((op.dst.offset | op.dst.sample | op.dst.seed | columns) & 3) == 0;
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    if (r0 + r >= rows || col >= columns) continue;
    const int m = (r0 + r) / t.seeds, s = r0 + r - m * t.seeds;
    T* y = t.at(op.dst, m, s);
    if (joined) {
      Four<T> sum = assign ? Four<T>{} : load4(y + col);
#pragma unroll
      for (int o = 0; o < 4; ++o) sum.v[o] += acc[r][o];
      store4(y + col, sum);
      continue;
    }
#pragma unroll
    for (int o = 0; o < 4; ++o)
      if (col + o < columns) {
        T* at = y + fixed(table + col + o);
        *at = assign ? acc[r][o] : *at + acc[r][o];
      }
  }
}

// out[r][col] (+)= Σ_c g[c][r] · w[c][col], `Rows` rows per lane; g is in the workspace as [c][stride].  If there are
// fewer tiles than warps, several warps share the sum over c, and add their parts one after the other.
template <class T, int Rows>
GK_DEVICE void product(const DenseTRecord& op, const Tile<T>& t, int rows, int stride, int c0, int channels,
                       bool assign) {
  const int columns = op.window_elements, row_length = op.row_length;
  const int down = (rows + 2 * Rows - 1) / (2 * Rows), items = down * ((columns + 4 * kColumns - 1) / (4 * kColumns));
  int parts = t.warps() / items < channels / kPartRows ? t.warps() / items : channels / kPartRows;
  if (parts < 1) parts = 1;
  const int share = (channels + parts - 1) / parts;
  for (int base = 0; base < items * parts; base += t.warps()) {
    const bool active = base + t.warp() < items * parts;
    const int all = active ? base + t.warp() : 0, part = all / items, item = all - part * items, first = part * share;
    const int col = item / down * (4 * kColumns) + t.lane() % kColumns * 4;
    const int r0 = item % down * (2 * Rows) + t.lane() / kColumns * Rows;
    const T* w = t.args.packed + op.weights + (c0 + first) * row_length + (col < columns ? col : 0);
    const T* g = t.buf + first * stride + (r0 < stride ? r0 : 0);
    T acc[Rows][4] = {};
    Four<T> ahead[kAhead<T>];  // weights being loaded from L2; the rows past the last are slack
#pragma unroll
    for (int k = 0; k < kAhead<T>; ++k, w += row_length) ahead[k] = fixed4(w);
    int left = !active ? 0 : channels - first < share ? channels - first : share;
    for (; left >= kAhead<T>; left -= kAhead<T>)
#pragma unroll
      for (int k = 0; k < kAhead<T>; ++k, w += row_length, g += stride) {
        outer<T, Rows>(acc, g, ahead[k]);
        ahead[k] = fixed4(w);
      }
#pragma unroll
    for (int k = 0; k < kAhead<T>; ++k, g += stride)
      if (k < left) outer<T, Rows>(acc, g, ahead[k]);
    for (int next = 0; next < parts; ++next) {
      if (active && part == next) store_product<T, Rows>(op, t, acc, rows, r0, col, assign && next == 0);
      if (parts > 1) __syncthreads();
    }
  }
}

// The tallest tile that wastes the fewest rows.
template <class T, int Rows>
GK_DEVICE void product_rows(const DenseTRecord& op, const Tile<T>& t, int rows, int stride, int c0, int channels,
                            bool assign) {
  const auto padded = [&](int height) { return (rows + 2 * height - 1) / (2 * height) * height; };
  if constexpr (Rows > 4) {
    bool tallest = true;
    for (int height = Rows - 4; height >= 4; height -= 4) tallest &= padded(Rows) <= padded(height);
    if (!tallest) return product_rows<T, Rows - 4>(op, t, rows, stride, c0, channels, assign);
  }
  product<T, Rows>(op, t, rows, stride, c0, channels, assign);
}

template <class T>
GK_RECORD void run(const DenseTRecord& op, const Tile<T> t) {
  const int rows = t.count * t.seeds, O = op.O;
  // As [channel][row] with 32 elements of slack, since a lane past the last row reads on.
  const int stride = (rows + 3) / 4 * 4, most = (t.args.workspace - 32) / stride, chunk = most < O ? most : O;
  for (int c0 = 0; c0 < O; c0 += chunk) {
    const int channels = O - c0 < chunk ? O - c0 : chunk;
    const Divider across(channels), seeds(t.seeds);
    for (int i = t.tid(); i < channels * stride; i += t.threads()) {
      const auto [r, c] = across.parts(i);
      T value = T(0);
      if (r < rows) {
        const auto [m, s] = seeds.parts(r);
        const bool alive = !op.pattern.taps || (t.bits(op.pattern, m)[(c0 + c) / 8] >> ((c0 + c) % 8) & 1);
        if (alive) value = op.seed_rows ? fixed(t.seed_row(m, s) + c0 + c) : t.at(op.src, m, s)[c0 + c];
      }
      t.buf[c * stride + r] = value;
    }
    __syncthreads();
    const bool assign = op.assign && c0 == 0;
    if constexpr (sizeof(T) == 8) product<T, 4>(op, t, rows, stride, c0, channels, assign);
    else product_rows<T, 16>(op, t, rows, stride, c0, channels, assign);
    __syncthreads();
  }
}

}  // namespace gradkern::cuda
