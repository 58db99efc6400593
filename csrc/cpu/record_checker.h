// The base of the checks of records (check_records.cpp) and of local seeds (check_local.cpp).
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "../record_fields.h"
#include "check_records.h"

namespace gradkern {

__extension__ typedef __int128 Wide;  // sums and products of numbers of records, without overflow

constexpr int64_t kLargest = int64_t(1) << 40;  // numbers of a record stay below this

// A number for an error message, cut to 64 bits.
inline int64_t shown(Wide x) { return static_cast<int64_t>(std::clamp<Wide>(x, INT64_MIN, INT64_MAX)); }

class RecordChecker {
 public:
  RecordChecker(const ChainCall& call, const CpuSizes& sizes, int64_t lanes) : call(call), sizes(sizes), lanes(lanes) {}

  const ChainCall& call;
  const CpuSizes& sizes;
  const int64_t lanes;         // elements of a vector
  int64_t number = 0;          // the record that is being checked
  const char* kind = nullptr;  // its kind

  template <class... Parts>
  void need(bool right, const Parts&... parts) const {
    GRADKERN_CHECK(right, "gradkern: record ", number, kind ? " (" : "", kind ? kind : "", kind ? ") " : " ", parts...,
                   "; records, sizes and tensors must be those of one plan");
  }

  // Checks a place at which elements first … last - 1 of a sample and seed are used.  Vectors may reach past the last
  // one: scratch memory has room for that at its end.
  void place(const Place& p, Wide last, Wide first = 0) const {
    need(p.sample == 0 || p.sample == sizes.sample, "has a stride of ", p.sample, " between samples of ", sizes.sample,
         " elements");
    const int64_t seeds = std::max<int64_t>(1, std::min(call.seed_tile, call.seeds()));
    const Wide begin = p.offset + first, end = p.offset + Wide(seeds - 1) * p.seed + last;
    need(begin >= 0 && end <= sizes.shared + sizes.sample, "uses elements ", shown(begin), " … ", shown(end - 1),
         " of the ", sizes.shared + sizes.sample, " of scratch memory");
  }

  // Checks that a kernel works on no more elements than there are.
  void extent(const Extent& e) const {
    const Wide most = Wide(sizes.shared) + sizes.sample;
    need(e.C >= 0 && e.H >= 0 && e.W >= 0 && e.C < kLargest && e.H < kLargest && e.W < kLargest &&
             Wide(e.H) * e.W <= most && Wide(e.H) * e.W * e.C <= most,
         "works on ", e.C, " x ", e.H, " x ", e.W, " elements");
  }

  // `count` integers of the tables from `offset` on, after a check that they exist.
  const int32_t* table(int64_t offset, Wide count, const char* what) const {
    need(offset >= 0 && count >= 0 && offset + count <= call.tables.numel(), "has ", what, " up to ",
         shown(offset + count), ", behind the ", call.tables.numel(), " integers of the tables");
    return data<int32_t>(call.tables) + offset;
  }

  static std::pair<Wide, Wide> range(const int32_t* from, int64_t count) {
    Wide low = count ? from[0] : 0, high = low;
    for (int64_t i = 0; i < count; ++i) low = std::min<Wide>(low, from[i]), high = std::max<Wide>(high, from[i]);
    return {low, high};
  }
};

// The table of local seeds, and the records that follow it (local.h).
void check_local(RecordChecker& checker);

}  // namespace gradkern
