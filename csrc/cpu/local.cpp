// The positions that local seeds reach.
#include "local.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace gradkern {

namespace {

template <class R>
const R& as(const Record& record) {
  return reinterpret_cast<const R&>(record);
}

bool all_set(const uint8_t* mask, int64_t n) { return std::memchr(mask, 0, static_cast<size_t>(n)) == nullptr; }
bool any_set(const uint8_t* mask, int64_t n) { return std::memchr(mask, 1, static_cast<size_t>(n)) != nullptr; }

void mark(uint8_t* dst, const uint8_t* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] |= src[i];
}

// Marks the positions that those of `src` reach along one axis by the taps of windows: step, count, offsets.
const int32_t* mark_taps(const int32_t* rule, const uint8_t* src, int64_t n, uint8_t* dst, int64_t size) {
  const int64_t step = rule[0], taps = rule[1];
  for (int64_t j = 0; j < taps; ++j) {
    const int64_t offset = rule[2 + j];
    if (step == 1) {
      const int64_t first = std::max<int64_t>(0, -offset), last = std::min(n, size - offset);
      for (int64_t q = first; q < last; ++q) dst[q + offset] |= src[q];
    } else {
      for (int64_t q = 0; q < n; ++q) {
        const int64_t p = q * step + offset;
        if (src[q] && p >= 0 && p < size) dst[p] = 1;
      }
    }
  }
  return rule + 2 + taps;
}

// Marks the positions that those of `src` reach, given as a range for each position of the source.
const int32_t* mark_ranges(const int32_t* rule, const uint8_t* src, int64_t n, uint8_t* dst) {
  for (int64_t q = 0; q < n; ++q)
    if (src[q]) std::memset(dst + rule[2 * q], 1, static_cast<size_t>(rule[2 * q + 1] - rule[2 * q]));
  return rule + 2 * n;
}

// Marks the source positions whose range contains a marked position of `dst`.
const int32_t* mark_readers(const int32_t* rule, uint8_t* src, int64_t n, const uint8_t* dst) {
  for (int64_t q = 0; q < n; ++q)
    src[q] |= std::memchr(dst + rule[2 * q], 1, static_cast<size_t>(rule[2 * q + 1] - rule[2 * q])) != nullptr;
  return rule + 2 * n;
}

// The bits of x, with a zero bit between neighbours.
uint64_t spread_bits(uint64_t x) {
  uint64_t y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (2 * i);
  return y;
}

}  // namespace

LocalSeeds::LocalSeeds(const int32_t* tables, int64_t local, const Record* records)
    : tables_(tables), records_(records) {
  const int32_t* t = tables + local - 1;
  slots_.resize(static_cast<size_t>(t[0]));
  steps_.resize(static_cast<size_t>(t[1]));
  seeds_at_ = t[2];
  t += 3;
  size_t bytes = 0;
  for (Slot& s : slots_) {
    s.H = t[0], s.W = t[1], s.C = t[2], s.row = t[3], s.interior = t[4];
    t += 5;
    bytes += 2 * static_cast<size_t>(s.H + s.W);
  }
  masks_.resize(bytes);
  uint8_t* mask = masks_.data();
  for (Slot& s : slots_)
    for (Positions* p : {&s.live, &s.read}) {
      p->rows = mask, p->columns = mask + s.H;
      mask += s.H + s.W;
    }
  for (size_t k = 0; k < steps_.size(); ++k, t += 4) {
    steps_[k] = Step{static_cast<Reach>(t[0]), t[1], t[2], tables + t[3]};
    if (records[k].kind == Kind::SeedOneHot) seed_record_ = &as<SeedOneHotRecord>(records[k]);
  }
  areas_.resize(steps_.size());
  starts_.resize(steps_.size());
}

void LocalSeeds::position(int64_t target, int64_t& h, int64_t& w) const {
  const SeedOneHotRecord& op = *seed_record_;
  const Slot& slot = slots_[static_cast<size_t>(seeds_at_)];
  const int64_t W = op.extent.W, P = op.extent.H * W, q = target % P;
  const int64_t element = q / W * op.dst.row + q % W * op.dst.position + target / P;
  h = element / slot.row, w = element % slot.row / slot.C;
}

std::vector<int64_t> LocalSeeds::order(const int64_t* targets, int64_t seeds) const {
  std::vector<uint64_t> keys(static_cast<size_t>(seeds));
  const bool rows = slots_[static_cast<size_t>(seeds_at_)].H > 1;
  for (int64_t s = 0; s < seeds; ++s) {
    int64_t h, w;
    position(targets[s], h, w);
    const auto x = static_cast<uint64_t>(w), y = static_cast<uint64_t>(h);
    keys[static_cast<size_t>(s)] = rows ? spread_bits(x) | spread_bits(y) << 1 : x;  // squares before rows
  }
  std::vector<int64_t> sorted(keys.size());
  std::iota(sorted.begin(), sorted.end(), 0);
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](int64_t a, int64_t b) { return keys[static_cast<size_t>(a)] < keys[static_cast<size_t>(b)]; });
  return sorted;
}

const Area* LocalSeeds::areas(const int64_t* targets, const int64_t* order, int64_t seeds) {
  std::memset(masks_.data(), 0, masks_.size());
  for (Slot& s : slots_) s.live.empty = s.read.empty = true;
  items_.clear();
  Slot& first = slots_[static_cast<size_t>(seeds_at_)];
  for (int64_t s = 0; s < seeds; ++s) {
    int64_t h, w;
    position(targets[order[s]], h, w);
    first.live.rows[h] = first.live.columns[w] = 1;
    first.live.empty = false;
  }
  const auto count = static_cast<int64_t>(steps_.size());
  for (int64_t k = 0; k < count; ++k) spread(k);
  for (Slot& s : slots_) {
    if (!s.live.empty) mark(s.read.rows, s.live.rows, s.H + s.W);
    s.read.empty &= s.live.empty;
  }
  for (int64_t k = 0; k < count; ++k) clip(k);
  for (size_t k = 0; k < areas_.size(); ++k) areas_[k].items = items_.data() + starts_[k];
  return areas_.data();
}

// Marks the positions of its destination that the record writes.
void LocalSeeds::spread(int64_t k) {
  const Step& step = steps_[static_cast<size_t>(k)];
  Area& area = areas_[static_cast<size_t>(k)];
  area = Area{};
  starts_[static_cast<size_t>(k)] = static_cast<int64_t>(items_.size());
  Slot &src = slots_[static_cast<size_t>(step.src)], &dst = slots_[static_cast<size_t>(step.dst)];
  if (step.reach == Reach::Nothing || step.src == step.dst) return;
  if (src.live.empty) return;
  switch (step.reach) {
    case Reach::Nothing: return;
    case Reach::All:
      std::memset(src.read.rows, 1, static_cast<size_t>(src.H + src.W));
      std::memset(dst.live.rows, 1, static_cast<size_t>(dst.H + dst.W));
      src.read.empty = false;
      break;
    case Reach::Same: mark(dst.live.rows, src.live.rows, src.H + src.W); break;
    case Reach::Taps:
      mark_taps(mark_taps(step.rule, src.live.rows, src.H, dst.live.rows, dst.H), src.live.columns, src.W,
                dst.live.columns, dst.W);
      break;
    case Reach::Ranges: spread_stencil(k, as<StencilTRecord>(records_[k])); break;
    case Reach::Moves: spread_moves(k, as<MoveTRecord>(records_[k])); break;
  }
  dst.live.empty = !any_set(dst.live.rows, dst.H) || !any_set(dst.live.columns, dst.W);
}

// A stencil reads from every position that it writes, so all that these positions read has to be zeroed.
void LocalSeeds::spread_stencil(int64_t k, const StencilTRecord& op) {
  const Step& step = steps_[static_cast<size_t>(k)];
  Slot &src = slots_[static_cast<size_t>(step.src)], &dst = slots_[static_cast<size_t>(step.dst)];
  scratch_.assign(static_cast<size_t>(dst.H + dst.W), 0);
  uint8_t *rows = scratch_.data(), *columns = rows + dst.H;
  mark_ranges(mark_ranges(step.rule, src.live.rows, src.H, rows), src.live.columns, src.W, columns);
  mark_readers(mark_readers(step.rule, src.read.rows, src.H, rows), src.read.columns, src.W, columns);
  src.read.empty = false;
  mark(dst.live.rows, rows, dst.H + dst.W);
  if (all_set(rows, dst.H + dst.W)) return void(areas_[static_cast<size_t>(k)].all = true);
  const int32_t* block = tables_ + op.stencil.block_table;
  for (int64_t b = 0; b < op.stencil.blocks; ++b, block += 7) {
    const auto row = static_cast<int32_t>(dst.row), C = static_cast<int32_t>(dst.C);
    bool open = false;
    for (int32_t q = 0; q < block[2]; ++q) {
      const int32_t place = block[1] + q * block[4], h = place / row, w = (place - h * row) / C;
      const bool live = rows[h] && columns[w];
      if (live && open) ++items_[items_.size() - 5];
      else if (live) {
        const int32_t part[7] = {block[0] + q * block[3], place, 1, block[3], block[4], block[5], block[6]};
        items_.insert(items_.end(), part, part + 7);
      }
      open = live;
    }
  }
  areas_[static_cast<size_t>(k)].count = (static_cast<int64_t>(items_.size()) - starts_[static_cast<size_t>(k)]) / 7;
}

// Lists the parts of a move's runs that come from live positions, position by position or element by element.
void LocalSeeds::spread_moves(int64_t k, const MoveTRecord& op) {
  const Step& step = steps_[static_cast<size_t>(k)];
  const Slot& src = slots_[static_cast<size_t>(step.src)];
  Slot& dst = slots_[static_cast<size_t>(step.dst)];
  const auto at = [](const Slot& slot, int32_t offset, int32_t& h, int32_t& w) {
    h = slot.H == 1 ? 0 : offset / static_cast<int32_t>(slot.row);
    const int32_t rest = offset - h * static_cast<int32_t>(slot.row);
    w = rest / static_cast<int32_t>(slot.C);
    return static_cast<int32_t>(slot.C) - rest % static_cast<int32_t>(slot.C);  // elements left of the position
  };
  const int32_t* run = tables_ + op.run_table;
  for (int64_t r = 0; r < op.runs; ++r, run += 5) {
    bool open = false;
    for (int32_t i = 0, step_over; i < run[2]; i += step_over) {
      int32_t h, w, to_h, to_w;
      const int32_t left = at(src, run[1] + i * run[4], h, w);
      const int32_t dst_left = at(dst, run[0] + i * run[3], to_h, to_w);
      step_over = run[3] == 1 && run[4] == 1 ? std::min({left, dst_left, run[2] - i}) : 1;
      const bool live = src.live.rows[h] && src.live.columns[w];
      if (live) {
        dst.live.rows[to_h] = dst.live.columns[to_w] = 1;
        if (open) items_[items_.size() - 3] += step_over;
        else {
          const int32_t part[5] = {run[0] + i * run[3], run[1] + i * run[4], step_over, run[3], run[4]};
          items_.insert(items_.end(), part, part + 5);
        }
      }
      open = live;
    }
  }
  areas_[static_cast<size_t>(k)].count = (static_cast<int64_t>(items_.size()) - starts_[static_cast<size_t>(k)]) / 5;
}

// Decides what the record does, once all positions are known.
void LocalSeeds::clip(int64_t k) {
  const Step& step = steps_[static_cast<size_t>(k)];
  Area& area = areas_[static_cast<size_t>(k)];
  const Slot &src = slots_[static_cast<size_t>(step.src)], &dst = slots_[static_cast<size_t>(step.dst)];
  const Kind kind = records_[k].kind;
  const bool zero = kind == Kind::Zero;
  const Positions& at = zero ? src.read : src.live;
  area.rows = at.rows, area.columns = at.columns;
  area.skip = at.empty && kind != Kind::StoreT;
  if (step.reach == Reach::Ranges || step.reach == Reach::Moves) return;
  area.all = !at.empty && (step.reach == Reach::All || (all_set(at.rows, src.H) && all_set(at.columns, src.W)));
  if (area.all) return;
  starts_[static_cast<size_t>(k)] = static_cast<int64_t>(items_.size());
  if (zero || kind == Kind::Rectify) spans(src, at, true, src.interior);
  else if (kind == Kind::StoreT || step.reach == Reach::Same) spans(src, at, false, 0);
  else if (area.skip && step.reach == Reach::All) spans(dst, dst.read, true, 0);  // would have been assigned
  area.count = (static_cast<int64_t>(items_.size()) - starts_[static_cast<size_t>(k)]) / 3;
}

// Appends (row, first element in the row, count) for the elements at these positions; if `flat`, all rows
// count as one that begins `before` elements before the interior.
void LocalSeeds::spans(const Slot& slot, const Positions& at, bool flat, int64_t before) {
  if (at.empty) return;
  runs_.clear();
  for (int64_t w = 0; w < slot.W;) {
    const void* next = std::memchr(at.columns + w, 1, static_cast<size_t>(slot.W - w));
    if (!next) break;
    const int64_t first = static_cast<const uint8_t*>(next) - at.columns;
    const void* end = std::memchr(at.columns + first, 0, static_cast<size_t>(slot.W - first));
    w = end ? static_cast<const uint8_t*>(end) - at.columns : slot.W;
    runs_.emplace_back(static_cast<int32_t>(first * slot.C), static_cast<int32_t>((w - first) * slot.C));
  }
  for (int64_t h = 0; h < slot.H; ++h)
    if (at.rows[h])
      for (const auto& [first, count] : runs_) {
        items_.push_back(flat ? 0 : static_cast<int32_t>(h));
        items_.push_back(flat ? static_cast<int32_t>(before + h * slot.row) + first : first);
        items_.push_back(count);
      }
}

}  // namespace gradkern
