// Checks the table of local seeds (local.cpp) against the records that it describes.
#include <vector>

#include "record_checker.h"

namespace gradkern {
namespace {

struct Slot {
  int64_t H, W, C, row, interior;
  int64_t elements() const { return W * C; }
};

class LocalChecker {
 public:
  explicit LocalChecker(RecordChecker& checker) : to_(checker), records_(data<Record>(*checker.call.backward)) {}

  void all() {
    const int64_t at = to_.sizes.local - 1, count = to_.call.backward->size(0);
    to_.number = 0, to_.kind = "local seeds";
    const int32_t* t = to_.table(at, 3, "seeds");
    to_.need(t[0] > 0 && t[1] == count && t[2] >= 0 && t[2] < t[0], "has a table of ", t[0], " slots and ", t[1],
             " rules for ", count, " records");
    to_.need(to_.sizes.block <= 1, "needs blocks of one sample, got ", to_.sizes.block);
    const int64_t slots = t[0], seeds_at = t[2];
    t = to_.table(at + 3, Wide(5) * slots + Wide(4) * count, "rules");  // before memory is allocated for them
    slots_.resize(static_cast<size_t>(slots));
    for (Slot& s : slots_) {
      s = Slot{t[0], t[1], t[2], t[3], t[4]};
      to_.need(s.C > 0 && s.row > 0 && s.interior >= 0, "has an empty slot");
      to_.extent({s.C, s.H, s.W});
      t += 5;
    }
    int seed_records = 0;
    for (int64_t k = 0; k < count; ++k, t += 4) {
      to_.number = k, to_.kind = kFields[static_cast<size_t>(records_[k].kind)].kind;
      to_.need(t[1] >= 0 && t[1] < int64_t(slots_.size()) && t[2] >= 0 && t[2] < int64_t(slots_.size()),
               "has no slots");
      seed_records += records_[k].kind == Kind::SeedOneHot;
      rule(records_[k], static_cast<Reach>(t[0]), slot(t[1]), slot(t[2]), t[3]);
      if (records_[k].kind == Kind::SeedOneHot) seeds(as<SeedOneHotRecord>(records_[k]), slot(seeds_at));
    }
    to_.need(seed_records == 1, "follows ", seed_records, " records of one-hot seeds");
  }

 private:
  RecordChecker& to_;
  const Record* records_;
  std::vector<Slot> slots_;

  const Slot& slot(int64_t i) const { return slots_[static_cast<size_t>(i)]; }
  template <class R>
  static const R& as(const Record& record) {
    return reinterpret_cast<const R&>(record);
  }

  // Row and column of an element.
  void element(const Slot& s, int64_t at) const {
    const int64_t h = at / s.row, w = at % s.row / s.C;
    to_.need(at >= 0 && (h < s.H || s.H == 1) && (s.H == 1 ? at / s.C : w) < s.W, "reaches element ", at,
             ", which is at no position");
  }

  void seeds(const SeedOneHotRecord& op, const Slot& s) const {
    for (int64_t h = 0; h < op.extent.H; ++h)
      for (int64_t w = 0; w < op.extent.W; ++w)
        for (int64_t c = 0; c < op.extent.C; ++c) {
          const int64_t at = h * op.dst.row + w * op.dst.position + c;
          to_.need(at / s.row < s.H && at % s.row / s.C < s.W, "has a seed at element ", at,
                   ", which is at no position");
        }
  }

  // Checks that a slot has masks of at least these rows and columns.
  void covers(const Slot& s, int64_t H, int64_t W) const {
    to_.need(s.H >= H && s.W >= W, "has ", H, " x ", W, " positions, and its slot ", s.H, " x ", s.W);
  }
  // Checks that a slot has the rows of this extent, as spans of elements.
  void spans(const Slot& s, const Extent& e) const {
    to_.need(s.H == e.H && s.elements() == e.W * e.C, "has ", e.H, " rows of ", e.W * e.C, " elements, and its slot ",
             s.H, " of ", s.elements());
  }
  void flat(const Slot& s, int64_t elements) const {
    to_.need(s.interior + Wide(s.H - 1) * s.row + s.elements() <= elements, "has ", elements,
             " elements, its slot more");
  }
  void one_of(Reach reach, Reach own) const {
    to_.need(reach == own || (own != Reach::Nothing && reach == Reach::All), "has a reach of another kind");
  }

  void taps(const Slot& src, const Slot& dst, int64_t at) const {
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t count = to_.table(at, 2, "taps")[1];
      to_.table(at, Wide(2) + count, "taps");
      to_.need(count >= 0, "has ", count, " taps");
      at += 2 + count;
    }
    to_.need(src.H > 0 && dst.H > 0, "has no rows");
  }
  void ranges(const Slot& src, const Slot& dst, int64_t at) const {
    const int32_t* t = to_.table(at, Wide(2) * (src.H + src.W), "ranges");
    for (int64_t q = 0; q < src.H + src.W; ++q, t += 2)
      to_.need(t[0] >= 0 && t[0] <= t[1] && t[1] <= (q < src.H ? dst.H : dst.W), "has a range ", t[0], " … ", t[1]);
  }
  void moves(const MoveTRecord& op, const Slot& src, const Slot& dst) const {
    const int32_t* run = to_.table(op.run_table, Wide(5) * op.runs, "runs");
    for (int64_t r = 0; r < op.runs; ++r, run += 5)
      for (int64_t i = 0; i < run[2]; ++i) element(src, run[1] + i * run[4]), element(dst, run[0] + i * run[3]);
  }
  void blocks(const StencilTRecord& op, const Slot& dst) const {
    const int32_t* block = to_.table(op.stencil.block_table, Wide(7) * op.stencil.blocks, "blocks");
    for (int64_t b = 0; b < op.stencil.blocks; ++b, block += 7)
      for (int64_t q = 0; q < block[2]; ++q) {
        const int64_t at = block[1] + q * block[4];
        to_.need(at >= 0 && at / dst.row < dst.H && at % dst.row / dst.C < dst.W, "reaches element ", at,
                 ", which is at no position");
      }
  }
  // Checks what is zeroed if a record that would have assigned is left out.
  void cleared(bool assign, const Place& dst, const Slot& s) const {
    if (assign && s.H > 0) to_.place(dst, Wide(s.H - 1) * s.row + s.elements());
  }
  void same(const Slot& src, const Slot& dst) const {
    to_.need(src.H == dst.H && src.W == dst.W, "has slots of different positions");
  }

  void rule(const Record& r, Reach reach, const Slot& src, const Slot& dst, int64_t at) const {
    switch (r.kind) {
      case Kind::Zero: one_of(reach, Reach::Nothing), flat(src, as<ZeroRecord>(r).elements); break;
      case Kind::Rectify: one_of(reach, Reach::Nothing), flat(src, as<RectifyRecord>(r).elements); break;
      case Kind::SeedOneHot: one_of(reach, Reach::Nothing); break;
      case Kind::StoreT: {
        const auto& op = as<StoreTRecord>(r);
        one_of(reach, Reach::Nothing), spans(src, op.extent);
        to_.place(op.src, Wide(op.extent.H - 1) * op.src.row + op.extent.W * op.extent.C);
        to_.need(src.C == op.extent.C || op.extent.C == 1 || op.extent.H * op.extent.W == 1, "has a slot of ", src.C,
                 " channels");
        break;
      }
      case Kind::WindowT: {
        const auto& op = as<WindowTRecord>(r);
        one_of(reach, Reach::Taps), cleared(op.assign, op.dst, dst);
        if (reach != Reach::All) covers(src, op.H, op.W);
        break;
      }
      case Kind::MatMulT:
        one_of(reach, Reach::All), cleared(as<MatMulTRecord>(r).assign, as<MatMulTRecord>(r).dst, dst);
        break;
      case Kind::PatternT:
        one_of(reach, Reach::Taps);
        if (reach != Reach::All) covers(src, as<PatternTRecord>(r).extent.H, as<PatternTRecord>(r).extent.W);
        break;
      case Kind::StencilT:
        one_of(reach, Reach::Ranges);
        if (reach != Reach::All) blocks(as<StencilTRecord>(r), dst);
        break;
      case Kind::MoveT:
        one_of(reach, Reach::Moves);
        if (reach != Reach::All) moves(as<MoveTRecord>(r), src, dst);
        break;
      case Kind::ElementwiseT:
        one_of(reach, Reach::Same);
        if (reach != Reach::All) spans(src, as<ElementwiseTRecord>(r).extent);
        break;
      case Kind::Accumulate:
        one_of(reach, Reach::Same);
        if (reach != Reach::All) spans(src, as<AccumulateRecord>(r).extent);
        break;
      case Kind::LinesT:
        one_of(reach, Reach::Same);
        if (reach != Reach::All) covers(src, as<LinesTRecord>(r).lines.extent.H, as<LinesTRecord>(r).lines.extent.W);
        break;
      case Kind::MultiplyT:
        one_of(reach, Reach::Same);
        if (reach != Reach::All) covers(src, as<MultiplyTRecord>(r).extent.H, as<MultiplyTRecord>(r).extent.W);
        break;
      default: to_.need(false, "has no rule for local seeds");
    }
    if (reach == Reach::Same) same(src, dst);
    if (reach == Reach::Taps) taps(src, dst, at);
    if (reach == Reach::Ranges) ranges(src, dst, at);
  }
};

}  // namespace

void check_local(RecordChecker& checker) { LocalChecker(checker).all(); }

}  // namespace gradkern
