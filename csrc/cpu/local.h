// Local seeds: a one-hot seed at a position reaches, layer by layer, only the positions of its receptive field.  For
// every tile of seeds, this finds the positions of each cotangent that can be anything but zero, and what each record
// of the backward pass has to do there.  gradkern/codegen/local.py makes the table that it reads.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "context.h"

namespace gradkern {

class LocalSeeds {
 public:
  // `local`: as in CpuSizes, the offset of the table, plus one.
  LocalSeeds(const int32_t* tables, int64_t local, const Record* records);

  // The order in which seeds share tiles: neighbouring positions together.
  std::vector<int64_t> order(const int64_t* targets, int64_t seeds) const;

  // The areas of all records for the seeds targets[order[0]] … targets[order[seeds - 1]].
  const Area* areas(const int64_t* targets, const int64_t* order, int64_t seeds);

 private:
  // Positions of a cotangent: the crossings of some rows and some columns.  The flags of columns follow those of rows.
  struct Positions {
    uint8_t *rows, *columns;
    bool empty = true;
  };
  // A cotangent: its storage, the positions that seeds reach, and the positions that records read, which are zeroed.
  struct Slot {
    int64_t H, W, C, row, interior;
    Positions live, read;
  };
  struct Step {  // of the backward pass
    Reach reach;
    int64_t src, dst;
    const int32_t* rule;
  };

  const int32_t* tables_;
  const Record* records_;
  int64_t seeds_at_ = 0;  // the slot of the seeds
  const SeedOneHotRecord* seed_record_ = nullptr;
  std::vector<Slot> slots_;
  std::vector<Step> steps_;
  std::vector<uint8_t> masks_, scratch_;
  std::vector<Area> areas_;
  std::vector<int32_t> items_;
  std::vector<int64_t> starts_;  // of each record's items
  std::vector<std::pair<int32_t, int32_t>> runs_;

  void position(int64_t target, int64_t& h, int64_t& w) const;
  void spread(int64_t k);
  void spread_moves(int64_t k, const MoveTRecord& op);
  void spread_stencil(int64_t k, const StencilTRecord& op);
  void clip(int64_t k);
  void spans(const Slot& slot, const Positions& at, bool flat, int64_t before);
};

}  // namespace gradkern
