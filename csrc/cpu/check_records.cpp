// Checks all memory that the kernels (body_*.h) use for the records of a chain, record by record.
#include "check_records.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <mutex>
#include <unordered_set>

#include "../content_hash.h"
#include "../elementwise.h"
#include "record_checker.h"

namespace gradkern {
namespace {

constexpr int kKinds = static_cast<int>(std::size(kFields));

int64_t functions() {
#define X(name) +1
  return 0 GRADKERN_FUNCTIONS(X);
#undef X
}

class Checker : public RecordChecker {
 public:
  Checker(const ChainCall& call, const CpuSizes& sizes, int64_t lanes)
      : RecordChecker(call, sizes, lanes), block_(std::max<int64_t>(1, sizes.block)) {}

  void all() {
    constexpr int64_t kMost = int64_t(1) << 56;  // sums of bytes do not overflow below it, and no memory is larger
    for (const Wide size : {Wide(sizes.shared), block_ * Wide(sizes.sample), block_ * Wide(sizes.bits),
                            Wide(sizes.entries), Wide(sizes.segments), Wide(sizes.block)})
      GRADKERN_CHECK(size < kMost, "gradkern: ", shown(size), " is not a valid size of scratch memory");
    pass(call.forward, Kind::Load, Kind::MatMul);
    if (!call.seeds()) return;
    pass(*call.backward, Kind::Zero, Kind::StoreT);
    if (sizes.local) check_local(*this);
  }

 private:
  const int64_t block_;
  struct Bits {
    PatternRef pattern;
    Extent extent;
  };
  std::vector<Bits> bits_;  // of the forward pass

  void pass(const Tensor& records, Kind first, Kind last) {
    const auto* all = data<Record>(records);
    for (int64_t k = 0; k < records.size(0); ++k) {
      number = k, kind = nullptr;
      const auto found = static_cast<int64_t>(all[k].kind);
      need(found >= 0 && found < kKinds, "has the unknown kind ", found);
      kind = kFields[found].kind;
      need(all[k].kind >= first && all[k].kind <= last, "does not belong in this pass");
      fields(reinterpret_cast<const int64_t*>(all + k), kFields[found].letters);
      record(all[k]);
    }
  }

  void fields(const int64_t* row, const char* letters) {
    for (int i = 0; i < kRecordWidth; ++i) {
      const char letter = *letters ? *letters++ : '1';
      const int64_t end = letter == 'n' ? kLargest : letter - '0';
      need(letter == 'd' || (row[i] >= 0 && row[i] < end), "has ", row[i], " in place ", i);
    }
  }

  template <class R>
  static const R& as(const Record& record) {
    return reinterpret_cast<const R&>(record);
  }

  void record(const Record& r) {
    switch (r.kind) {
      case Kind::Load: return load(as<LoadRecord>(r));
      case Kind::Store: return store(as<StoreRecord>(r));
      case Kind::Window: return window(as<WindowRecord>(r));
      case Kind::Stencil: return stencil(as<StencilRecord>(r), as<StencilRecord>(r).bias);
      case Kind::Pattern: return pattern(as<PatternRecord>(r));
      case Kind::Elementwise: return elementwise(as<ElementwiseRecord>(r));
      case Kind::Add: return add(as<AddRecord>(r));
      case Kind::Move: return move(as<MoveRecord>(r), 0, 1, 3, 4);
      case Kind::Multiply: return multiply(as<MultiplyRecord>(r));
      case Kind::Lines: return lines(as<LinesRecord>(r));
      case Kind::MatMul: return matmul(as<MatMulRecord>(r));
      case Kind::Zero: return place(as<ZeroRecord>(r).dst, as<ZeroRecord>(r).elements);
      case Kind::Rectify: return place(as<RectifyRecord>(r).dst, as<RectifyRecord>(r).elements);
      case Kind::SeedRows: return seed_rows(as<SeedRowsRecord>(r));
      case Kind::SeedOneHot: return seed_onehot(as<SeedOneHotRecord>(r));
      case Kind::SeedDense: return seed_dense(as<SeedDenseRecord>(r));
      case Kind::WindowT: return window_t(as<WindowTRecord>(r));
      case Kind::StencilT: return stencil(as<StencilTRecord>(r), -1);
      case Kind::PatternT: return pattern_t(as<PatternTRecord>(r));
      case Kind::ElementwiseT: return elementwise_t(as<ElementwiseTRecord>(r));
      case Kind::Accumulate: return accumulate(as<AccumulateRecord>(r));
      case Kind::MoveT: return move(as<MoveTRecord>(r), 1, 0, 4, 3);
      case Kind::MultiplyT: return multiply_t(as<MultiplyTRecord>(r));
      case Kind::LinesT: return lines(as<LinesTRecord>(r));
      case Kind::MatMulT: return matmul(as<MatMulTRecord>(r));
      case Kind::StoreT: return store_t(as<StoreTRecord>(r));
      case Kind::PooledWindow:
      case Kind::ScatterT:
      case Kind::DenseT: need(false, "is a GPU's");
    }
  }

  // ---- what a kernel reads and writes

  void packed(int64_t offset, Wide count) {
    need(offset + count <= call.packed.numel(), "reads weights up to ", shown(offset + count), ", behind the ",
         call.packed.numel(), " that there are");
  }
  int64_t vectors(int64_t elements) const { return (elements + lanes - 1) / lanes; }

  // Checks rows of positions with adjacent channels, or rows of contiguous elements.
  void positions(const Place& p, const Extent& e) {
    const bool contiguous = e.C == 1 || e.W * e.H == 1;
    if (e.C * e.H * e.W == 0) return;
    const Wide row = std::max(Wide(e.W - 1) * p.position + e.C, contiguous ? Wide(e.W) * e.C : 0);
    place(p, Wide(e.H - 1) * p.row + row);
  }
  void rows(const Place& p, const Extent& e) {
    extent(e);
    if (e.C * e.H * e.W > 0) place(p, Wide(e.H - 1) * p.row + Wide(e.W) * e.C);
  }
  void grid(const Place& p, const Extent& e, int64_t channel) {
    extent(e);
    if (e.C * e.H * e.W > 0) place(p, Wide(e.H - 1) * p.row + Wide(e.W - 1) * p.position + Wide(e.C - 1) * channel + 1);
  }
  void external(int64_t number, const Tensors& list, int64_t leading, const Extent& e, const char* what) {
    need(number < static_cast<int64_t>(list.size()), "names ", what, " ", number, " of ", list.size());
    extent(e);
    const int64_t of = std::max<int64_t>(leading, 1), size = list[static_cast<size_t>(number)].numel() / of;
    need(e.C * e.H * e.W == size, "expects ", e.C * e.H * e.W, " numbers of each sample in ", what, " ", number,
         ", got ", size);
  }

  void load(const LoadRecord& op) {
    external(op.input, call.inputs, call.samples(), op.extent, "input");
    positions(op.dst, op.extent);
  }
  void store(const StoreRecord& op) {
    external(op.output, call.outputs, call.samples(), op.extent, "output");
    positions(op.src, op.extent);
  }
  void store_t(const StoreTRecord& op) {
    const auto [C, H, W] = op.extent;
    external(op.result, call.results, call.samples() * call.seeds(), op.extent, "result");
    if (op.fold <= 1) return positions(op.src, op.extent);
    rows(op.src, op.extent);  // as local seeds read them
    for (int64_t h = 0; h < H; ++h) {
      const int64_t row = h + op.halo_rows;
      const Wide step = Wide(op.fold) * C;
      place(op.src, Wide(row / op.fold * op.fold) * op.src.row + (op.halo_columns + W - 1) * step +
                        Wide(row % op.fold) * C + C);
    }
  }

  void window(const WindowRecord& op) {
    need(op.O > 0 && op.groups > 0 && op.O < kLargest / op.groups, "has ", op.groups, " groups of ", op.O, " channels");
    const Wide K = Wide(op.runs) * op.run_length;
    packed(op.weights, op.groups * K * vectors(op.O) * lanes);
    packed(op.bias, Wide(op.groups) * vectors(op.O) * lanes);
    const auto [low, high] = range(table(op.run_table, op.runs, "runs"), op.runs);
    extent({1, op.H, op.W});
    if (op.H * op.W == 0) return;
    const auto last = [&](const Place& p) { return Wide(op.H - 1) * p.row + Wide(op.W - 1) * p.position; };
    if (K) place(op.src, last(op.src) + Wide(op.groups - 1) * op.C + high + op.run_length, low);
    place(op.dst, last(op.dst) + Wide(op.groups) * op.O);
  }

  template <class R>
  void stencil(const R& op, int64_t bias) {
    const StencilTable& s = op.stencil;
    const int32_t* block = table(s.block_table, Wide(7) * s.blocks, "blocks");
    if (bias >= 0) packed(bias, Wide(vectors(op.C)) * lanes);
    extent({op.C, 1, 1});
    for (int64_t b = 0; b < s.blocks; ++b, block += 7) {
      const int64_t count = block[2], first = block[5], entries = block[6];
      need(count >= 0 && first >= 0 && entries >= 0, "has a block of ", count, " positions and ", entries, " entries");
      extent({op.C, count, 1});
      if (!count) continue;
      const int32_t* entry = table(s.entry_table, Wide(2) * (first + entries), "entries") + 2 * first;
      Wide low = 0, high = 0;
      for (int64_t e = 0; e < entries; ++e) {
        const Wide offset = entry[2 * e], row = entry[2 * e + 1];
        low = e ? std::min(low, offset) : offset, high = e ? std::max(high, offset) : offset;
        need(row >= 0, "has a weight row ", shown(row));
        packed(s.weights, row * s.row_length + Wide(vectors(op.C)) * lanes);
      }
      const Wide read = block[0], dx = Wide(count - 1) * block[3], put = block[1], dy = Wide(count - 1) * block[4];
      if (entries) place(op.src, read + high + std::max<Wide>(dx, 0) + op.C, read + low + std::min<Wide>(dx, 0));
      place(op.dst, put + std::max<Wide>(dy, 0) + op.C, put + std::min<Wide>(dy, 0));
    }
  }

  // Checks the bits of a pattern whose output has this extent.
  void bits(const PatternRef& p, const Extent& e) {
    need(p.taps == p.kh * p.kw && p.taps > 0 && p.taps <= kMaxTaps, "has ", p.taps, " taps of a window of ", p.kh,
         " x ", p.kw);
    extent(e);
    need(p.plane_bytes >= (e.C + 15) / 16 * 2, "has ", p.plane_bytes, " bytes for ", e.C, " channels");
    const Wide end = p.bits + Wide(e.H) * e.W * p.taps * p.plane_bytes;
    need(end <= sizes.bits, "has bits up to ", shown(end), ", behind the ", sizes.bits, " of a sample");
    for (const int64_t x : {p.H, p.W, p.sh, p.sw, p.ph, p.pw, p.dh, p.dw, p.bits, p.plane_bytes})
      need(x < int64_t(1) << 31, "has ", x, " in its pattern");
  }
  void pattern(const PatternRecord& op) {
    bits(op.pattern, op.extent);
    const auto size = [](const Bits& b) { return b.extent.H * b.extent.W * b.pattern.taps * b.pattern.plane_bytes; };
    const Bits mine{op.pattern, op.extent};
    for (const Bits& other : bits_)
      need(
          mine.pattern.bits + size(mine) <= other.pattern.bits || other.pattern.bits + size(other) <= mine.pattern.bits,
          "writes the bits of another pattern");
    bits_.push_back(mine);
    positions(op.dst, op.extent);
    positions(op.src, {op.extent.C, op.pattern.H, op.pattern.W});
  }
  // Checks that the forward pass has written the bits that the backward pass reads, so that none names a channel that
  // does not exist.
  void known_bits(const PatternRef& p, const Extent& e) {
    const auto same = [&](const Bits& b) {
      return !std::memcmp(&b.pattern, &p, sizeof p) && !std::memcmp(&b.extent, &e, sizeof e);
    };
    need(std::any_of(bits_.begin(), bits_.end(), same), "reads bits that no pattern of the forward pass writes");
  }
  void pattern_t(const PatternTRecord& op) {
    known_bits(op.pattern, op.extent);
    grid(op.src, op.extent, 1);
    grid(op.dst, {op.extent.C, op.pattern.H, op.pattern.W}, 1);
  }

  void elementwise(const ElementwiseRecord& op) {
    need(op.function < functions(), "has function ", op.function, " of ", functions());
    for (const Place* p : {&op.src, &op.dst, &op.slope}) rows(*p, op.extent);
  }
  void elementwise_t(const ElementwiseTRecord& op) {
    for (const Place* p : {&op.src, &op.dst, &op.slope}) rows(*p, op.extent);
  }
  void add(const AddRecord& op) {
    for (const Place* p : {&op.left, &op.right, &op.dst}) rows(*p, op.extent);
  }
  void accumulate(const AccumulateRecord& op) { rows(op.src, op.extent), rows(op.dst, op.extent); }

  // `from`, `to`: the places in a run of the first element that is read and written, and of their steps.
  template <class R>
  void move(const R& op, int from, int to, int from_step, int to_step) {
    const int32_t* run = table(op.run_table, Wide(5) * op.runs, "runs");
    for (int64_t k = 0; k < op.runs; ++k, run += 5) {
      need(run[2] >= 0, "has a run of ", run[2], " elements");
      extent({run[2], 1, 1});
      if (!run[2]) continue;
      const auto ends = [&](const Place& p, int first, int step) {
        const Wide steps = Wide(run[2] - 1) * run[step];
        place(p, run[first] + std::max<Wide>(steps, 0) + 1, run[first] + std::min<Wide>(steps, 0));
      };
      ends(op.src, from, from_step), ends(op.dst, to, to_step);
    }
  }

  void multiply(const MultiplyRecord& op) {
    grid(op.left, op.extent, op.left_channel), grid(op.right, op.extent, op.right_channel), grid(op.dst, op.extent, 1);
  }
  void multiply_t(const MultiplyTRecord& op) {
    need(op.dst_channel <= 1 && op.other_channel <= 1, "has a stride between channels that is not 0 or 1");
    grid(op.src, op.extent, 1), grid(op.other, op.extent, op.other_channel), grid(op.dst, op.extent, op.dst_channel);
  }

  template <class R>
  void lines(const R& op) {
    const Extent& e = op.lines.extent;
    for (const Place* p : {&op.src, &op.dst, &op.lines.saved}) rows(*p, e);
    need(e.C > 0 && e.H > 0 && e.W > 0, "has lines of nothing");
    const int64_t along = op.lines.along == Along::Channels ? e.C : op.lines.along == Along::Columns ? e.W : e.H;
    if (op.lines.function == LineFunction::Normalize)
      place(op.lines.saved, op.lines.deviations + Wide(e.C * e.H * e.W / along));
  }

  template <class R>
  void matmul(const R& op) {
    need(op.right_column == 1, "has a stride of ", op.right_column, " between columns of the right side");
    extent({op.matrices, op.rows, op.columns}), extent({op.terms, 1, 1});
    if (op.matrices * op.rows * op.columns == 0) return;
    const Wide m = op.matrices - 1, r = op.rows - 1, t = op.terms - 1;
    place(op.dst, m * op.dst.row + r * op.dst.position + op.columns);
    if (!op.terms) return;
    place(op.left, m * op.left.row + r * op.left.position + t * op.left_term + 1);
    place(op.right, m * op.right.row + t * op.right.position + op.columns);
  }

  // ---- seeds

  // Checks what is read of each of the caller's seed rows.
  void row_of_seeds(Wide count) {
    need(call.seed_rows != nullptr, "reads the rows of the last weight, and none are given");
    need(count <= call.seed_rows->size(-1), "reads ", shown(count), " numbers of a row of the last weight, which has ",
         call.seed_rows->size(-1));
  }
  void seed_rows(const SeedRowsRecord& op) {
    row_of_seeds(op.elements);
    place(op.dst, op.elements);
  }
  void seed_onehot(const SeedOneHotRecord& op) {
    need(call.targets != nullptr, "needs targets");
    external(0, call.outputs, call.samples(), op.extent, "output");
    positions(op.dst, op.extent);
  }
  void seed_dense(const SeedDenseRecord& op) {
    external(op.cotangent, call.cotangents, call.samples() * call.seeds(), op.extent, "cotangent");
    positions(op.dst, op.extent);
  }

  void window_t(const WindowTRecord& op) {
    const PatternRef& p = op.pattern;
    extent({1, op.H, op.W});
    need(op.O > 0 && op.groups > 0 && op.O % op.groups == 0, "has ", op.groups, " groups of ", op.O, " channels");
    need(op.sweep > 0, "sweeps over ", op.sweep, " positions");
    const int64_t at_once = op.whole_block ? block_ : 1, taps = std::max<int64_t>(p.taps, 1);
    if (p.taps) known_bits(p, {op.O, op.H, op.W});
    need(p.taps || !op.merged, "merges the taps of no pattern");  // no list of weight rows would be written
    need(op.O * (op.merged ? taps : 1) <= 1 << 16, "has ", op.O, " channels");
    const Wide cells = Wide(op.H) * op.W * taps;
    const Wide listed = Wide(op.O) * (p.taps ? at_once * cells : std::min<Wide>(op.sweep, at_once * cells) + 1);
    need(listed <= sizes.entries && at_once * (cells + (p.taps ? 1 : 0)) <= sizes.segments, "lists ", shown(listed),
         " channels in ", shown(at_once * cells), " segments, and there is room for ", sizes.entries, " in ",
         sizes.segments);
    const int32_t* window = table(op.window_table, Wide(2) * op.window_vectors, "window");
    if (!op.window_vectors || op.H * op.W == 0) return;
    packed(op.weights, Wide(op.O * (op.merged ? taps : 1) - 1) * op.row_length + Wide(op.window_vectors) * lanes);
    Wide low = window[0], high = window[0];
    for (int64_t v = 0; v < op.window_vectors; ++v, window += 2) {
      need(window[1] >= 0 && window[1] <= lanes, "has ", window[1], " elements in a vector of ", lanes);
      low = std::min<Wide>(low, window[0]), high = std::max(high, Wide(window[0]) + window[1]);
    }
    const bool taps_apart = p.taps && !op.merged;
    const int64_t H = taps_apart ? p.H : op.H, W = taps_apart ? p.W : op.W;
    const Wide groups = op.groups > 1 ? Wide(op.groups - 1) * op.C : 0;
    place(op.dst,
          Wide(std::max<int64_t>(H - 1, 0)) * op.dst.row + Wide(std::max<int64_t>(W - 1, 0)) * op.dst.position +
              groups + high,
          low);
    const Wide read = Wide(op.H - 1) * op.src.row + Wide(op.W - 1) * op.src.position + op.O;
    op.seed_rows ? row_of_seeds(read) : place(op.src, read);
  }
};

// A hash of everything that the checks depend on.
uint64_t fingerprint(const ChainCall& call, const CpuSizes& sizes, int64_t lanes) {
  std::vector<int64_t> facts{lanes,
                             call.single(),
                             call.packed.numel(),
                             std::min(call.seed_tile, call.seeds()),
                             call.targets != nullptr,
                             call.seed_rows ? call.seed_rows->size(-1) : -1};
  const int64_t n = std::max<int64_t>(call.samples(), 1), seeds = std::max<int64_t>(call.seeds(), 1);
  const auto add = [&](const Tensors& list, int64_t of) {
    facts.push_back(static_cast<int64_t>(list.size()));
    for (const Tensor& t : list) facts.push_back(t.numel() / of);
  };
  add(call.inputs, n), add(call.outputs, n), add(call.cotangents, n * seeds), add(call.results, n * seeds);
  uint64_t hash = hash_bytes(0, facts.data(), facts.size() * sizeof(int64_t));
  hash = hash_bytes(hash, &sizes, sizeof sizes);
  for (const Tensor* t : {&call.tables, &call.forward, call.backward})
    if (t) hash = hash_bytes(hash, t->const_data_ptr(), static_cast<size_t>(t->numel() * t->element_size()));
  return hash;
}

constexpr size_t kRemembered = 4096;  // chains

}  // namespace

void check_records(const ChainCall& call, const CpuSizes& sizes, int64_t lanes) {
  static std::mutex lock;
  static std::unordered_set<uint64_t> right;
  const uint64_t key = fingerprint(call, sizes, lanes);
  {
    const std::lock_guard<std::mutex> held(lock);
    if (right.count(key) != 0) return;
  }
  Checker(call, sizes, lanes).all();
  const std::lock_guard<std::mutex> held(lock);
  if (right.size() >= kRemembered) right.clear();
  right.insert(key);
}

}  // namespace gradkern
