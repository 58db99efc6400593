// CPU launch of a chain: torch's own threads process blocks of samples, each with its own scratch memory.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../content_hash.h"
#include "../op_bodies.h"
#include "check_records.h"
#include "isa.h"
#include "local.h"
#include "statistics.h"

namespace gradkern {

const Isa* const* isa_table() {
#define X(name) &name::kIsa,
  static const Isa* const table[] = {GRADKERN_ISAS(X) nullptr};
#undef X
  return table;
}

// Weights are packed for one vector length, so the choice is made once per process.
const Isa& current_isa() {
  static const Isa* const chosen = [] {
    const char* wanted = std::getenv("GRADKERN_ISA");
    const bool named = wanted && *wanted;
    std::string known;
    for (const Isa* const* isa = isa_table(); *isa; ++isa) {
      if (!named && (*isa)->supported()) return *isa;
      if (named && std::strcmp((*isa)->name, wanted) == 0) {
        GRADKERN_CHECK((*isa)->supported(), "gradkern: GRADKERN_ISA=", wanted, " is not supported by this processor");
        return *isa;
      }
      known += (known.empty() ? "" : ", ") + std::string((*isa)->name);
    }
    GRADKERN_CHECK(false, "gradkern: GRADKERN_ISA=", wanted, " is unknown; use one of ", known);
  }();
  return *chosen;
}

namespace {

// One thread's memory.  It is kept between calls if it is small, so that a single sample does not pay for page faults.
class Scratch {
 public:
  char* take(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;  // stays zero if the next line throws
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      GRADKERN_CHECK(memory_, "gradkern: out of memory for ", bytes, " bytes of scratch");
      size_ = bytes;
    }
    return memory_.get();
  }
  void trim() {
    if (size_ > kKeep) memory_.reset(), size_ = 0;
  }

 private:
  static constexpr size_t kKeep = size_t(8) << 20;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

// The caller's tensors for one thread's kernels, from a block's first sample and a tile's first seed on.
template <class T>
class Ports {
 public:
  Ports(const ChainCall& call, Context<T>& context, bool stores)
      : call_(call),
        context_(context),
        inputs_(call.inputs.size()),
        cotangents_(call.cotangents.size()),
        outputs_(call.outputs.size()),
        results_(call.results.size()) {
    for (const Tensor& x : call.inputs) input_n_.push_back(x.numel() / call.samples());
    for (const Tensor& y : call.outputs) output_n_.push_back(y.size(1));
    context.inputs = inputs_.data(), context.input_n = input_n_.data();
    context.outputs = stores ? outputs_.data() : nullptr, context.output_n = output_n_.data();
    context.results = results_.data(), context.cotangents = cotangents_.data();
    context.seeds_total = call.seeds();
    call.describe_seeds<T>(context);
    targets_ = context.targets, seed_rows_ = context.seed_rows;
  }
  void go_to_block(int64_t first, int64_t samples) {
    context_.samples = samples;
    for (size_t i = 0; i < inputs_.size(); ++i) inputs_[i] = data<T>(call_.inputs[i]) + first * input_n_[i];
    for (size_t i = 0; i < outputs_.size(); ++i) outputs_[i] = mutable_data<T>(call_.outputs[i]) + first * output_n_[i];
  }
  // Consecutive seeds or, if there is an order, the seeds that it names.
  const int64_t* targets(int64_t sample) const { return targets_ + sample * context_.target_n; }
  void go_to_seeds(int64_t first, int64_t seed, int64_t seeds, const int64_t* order) {
    context_.seeds = seeds;
    context_.order = order ? order + seed : nullptr;
    if (order) seed = 0;
    if (targets_) context_.targets = targets_ + first * context_.target_n + seed;
    if (seed_rows_) context_.seed_rows = seed_rows_ + first * context_.seed_rows_n + seed * context_.seed_rows_s;
    const int64_t all = call_.samples() * context_.seeds_total, row = first * context_.seeds_total + seed;
    for (size_t i = 0; i < results_.size(); ++i)
      results_[i] = mutable_data<T>(call_.results[i]) + row * (call_.results[i].numel() / all);
    for (size_t i = 0; i < cotangents_.size(); ++i)
      cotangents_[i] = data<T>(call_.cotangents[i]) + row * (call_.cotangents[i].numel() / all);
  }

 private:
  const ChainCall& call_;
  Context<T>& context_;
  std::vector<const T*> inputs_, cotangents_;
  std::vector<T*> outputs_, results_;
  std::vector<int64_t> input_n_, output_n_;
  const int64_t* targets_;
  const T* seed_rows_;
};

// The division of work: each thread takes blocks of samples or, if these are few, a share of the seeds of every block.
struct Division {
  int64_t block;   // samples
  int64_t shares;  // into which the seeds are divided
};

constexpr int64_t kWorthSharing = 1 << 20;  // multiply-adds; a thread takes microseconds to start

// Multiply-adds of the backward pass of one seed, as if nothing were zero.
int64_t backward_macs(const ChainCall& call) {
  const auto* records = data<Record>(*call.backward);
  const int64_t lanes = current_isa().vector_bytes / (call.single() ? sizeof(float) : sizeof(double));
  int64_t macs = 0;
  for (int64_t i = 0; i < call.backward->size(0); ++i) {
    if (records[i].kind == Kind::WindowT) {
      const auto& op = reinterpret_cast<const WindowTRecord&>(records[i]);
      macs += op.H * op.W * op.O * op.window_vectors * lanes;
    } else if (records[i].kind == Kind::MatMulT) {
      const auto& op = reinterpret_cast<const MatMulTRecord&>(records[i]);
      macs += op.matrices * op.rows * op.columns * op.terms;
    }
  }
  return macs;
}

// By count: a block costs one forward pass and one backward pass per seed, and every share repeats the forward pass.
Division divide(const ChainCall& call, int64_t most, int64_t seed_block) {
  const int64_t samples = call.samples(), seeds = call.seeds(), threads = torch::stable::get_num_threads();
  const int64_t block = std::max<int64_t>(1, std::min(most, (samples + threads - 1) / threads));
  const int64_t shares = std::min(threads, (seeds + seed_block - 1) / seed_block);
  if (shares < 2) return {block, 1};
  const int64_t blocks = (samples + block - 1) / block, on_one = (blocks + threads - 1) / threads * block;
  const double by_samples = static_cast<double>(std::min(samples, on_one) * (1 + seeds));
  const double by_seeds = static_cast<double>(samples) * (1 + static_cast<double>(seeds) / shares);
  if (1.1 * by_seeds > by_samples || samples * seeds * backward_macs(call) < kWorthSharing) return {block, 1};
  return {std::min(most, samples), shares};
}

// A tile of seeds, cut evenly into blocks of at most `most` as the kernels cut it (tiles.h).
struct Tile {
  int64_t seeds, blocks;
  Tile(int64_t seeds, int64_t most) : seeds(seeds), blocks((seeds + most - 1) / most) {}
  int64_t start(int64_t b) const { return b * (seeds / blocks) + std::min(b, seeds % blocks); }
};

// Calls f(first seed of a tile, tile, its blocks from, to) for everything in one of `shares` equal shares of the seeds.
template <class F>
void for_tiles(const ChainCall& call, int64_t most, int64_t share, int64_t shares, const F& f) {
  const int64_t seeds = call.seeds();
  const auto tile_at = [&](int64_t s) { return Tile(std::min(call.seed_tile, seeds - s), most); };
  int64_t blocks = 0, before = 0;
  for (int64_t s = 0; s < seeds; s += call.seed_tile) blocks += tile_at(s).blocks;
  const int64_t first = blocks * share / shares, last = blocks * (share + 1) / shares;
  for (int64_t s = 0; s < seeds; s += call.seed_tile) {
    const Tile tile = tile_at(s);
    const int64_t from = std::max<int64_t>(first - before, 0), to = std::min(last - before, tile.blocks);
    if (from < to) f(s, tile, from, to);
    before += tile.blocks;
  }
}

// Whether all slopes and factors that cotangents are multiplied with are finite: 0 · Inf is NaN, as in torch.
template <class T>
bool finite_slopes(const ChainCall& call, const Context<T>& ctx) {
  const auto* records = data<Record>(*call.backward);
  bool finite = true;
  const auto check = [&](const Place& place, int64_t H, int64_t W, int64_t count) {
    for (int64_t n = 0; n < ctx.samples; ++n)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t w = 0; w < W; ++w) {
          const T* x = ctx.buf + place.offset + n * place.sample + h * place.row + w * place.position;
          T sum = 0;
          for (int64_t i = 0; i < count; ++i) sum += x[i] - x[i];
          finite &= sum == 0;
        }
  };
  for (int64_t k = 0; k < call.backward->size(0); ++k) {
    if (records[k].kind == Kind::ElementwiseT) {
      const auto& op = reinterpret_cast<const ElementwiseTRecord&>(records[k]);
      check(op.slope, op.extent.H, 1, op.extent.W * op.extent.C);
    } else if (records[k].kind == Kind::MultiplyT) {
      const auto& op = reinterpret_cast<const MultiplyTRecord&>(records[k]);
      check(op.other, op.extent.H, op.extent.W, op.other_channel ? op.extent.C : 1);
    } else if (records[k].kind == Kind::LinesT) {
      const auto& op = reinterpret_cast<const LinesTRecord&>(records[k]);
      check(op.lines.saved, op.lines.extent.H, 1, op.lines.extent.W * op.lines.extent.C);
    }
  }
  return finite;
}

template <class T>
void launch(const Kernels<T>& kernels, const ChainCall& call, const CpuSizes& sizes) {
  const int64_t samples = call.samples();
  const auto [block, shares] = divide(call, std::max<int64_t>(1, sizes.block), kernels.seed_block);
  const int64_t blocks = (samples + block - 1) / block;
  const auto round = [](int64_t x) { return (x + 63) / 64 * 64; };
  const int64_t elements = round(sizes.shared + block * sizes.sample + 64);
  const int64_t bits = round(block * sizes.bits + 64);
  const int64_t entries = round(sizes.entries + 64), segments = sizes.segments + 8;
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(T)) + bits + entries * 4 +
                        segments * static_cast<int64_t>(sizeof(Segment));
  const auto* forward = data<Record>(call.forward);
  const auto* backward = call.backward ? data<Record>(*call.backward) : nullptr;

  const auto work = [&](int64_t begin, int64_t end, int64_t share) {  // blocks of samples
    thread_local Scratch scratch;
    char* memory = scratch.take(static_cast<size_t>(bytes));
    Context<T> ctx{};
    ctx.buf = reinterpret_cast<T*>(memory);
    ctx.bits = reinterpret_cast<uint8_t*>(memory + elements * sizeof(T));
    ctx.bits_sample = sizes.bits;
    ctx.segments = reinterpret_cast<Segment*>(ctx.bits + bits);
    ctx.channels = reinterpret_cast<uint16_t*>(ctx.segments + segments);
    ctx.weight_rows = ctx.channels + entries;
    ctx.packed = data<T>(call.packed);
    ctx.tables = data<int32_t>(call.tables);
    // Halos and slack must be zero.  They stay zero, because records write only interiors.
    std::memset(memory, 0, static_cast<size_t>(elements * sizeof(T) + bits));
    Ports<T> ports(call, ctx, share == 0);
    std::optional<LocalSeeds> local;
    if (sizes.local && call.seeds()) local.emplace(ctx.tables, sizes.local, backward);
    std::vector<int64_t> seed_order;
    for (int64_t b = begin; b < end; ++b) {
      ports.go_to_block(b * block, std::min(block, samples - b * block));
      kernels.run(forward, call.forward.size(0), ctx);
      const int64_t* targets = local ? ports.targets(b * block) : nullptr;
      if (local && (b == begin || ctx.target_n)) seed_order = local->order(targets, call.seeds());
      const int64_t* order = local ? seed_order.data() : nullptr;
      const bool everywhere = !local || !finite_slopes(call, ctx);
      for_tiles(call, kernels.seed_block, share, shares, [&](int64_t s, const Tile& tile, int64_t from, int64_t to) {
        ctx.tile_seeds = tile.seeds, ctx.tile_first = tile.start(from);
        ports.go_to_seeds(b * block, s + ctx.tile_first, tile.start(to) - ctx.tile_first, order);
        ctx.areas = everywhere ? nullptr : local->areas(targets, order + s, tile.seeds);
        kernels.run(backward, call.backward->size(0), ctx);
        ctx.areas = nullptr;
      });
    }
    scratch.trim();
  };
  if (shares == 1) parallel_for(blocks, 1, [&](int64_t begin, int64_t end) { work(begin, end, 0); });
  else
    parallel_for(shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) work(0, blocks, share);
    });
}

void run(const ChainCall& call, const CpuSizes& sizes) {
  const Isa& isa = current_isa();
  check_records(call, sizes, isa.vector_bytes / (call.single() ? sizeof(float) : sizeof(double)));
  call.single() ? launch<float>(isa.f32, call, sizes) : launch<double>(isa.f64, call, sizes);
}

template <class T>
void launch_rescale(const Kernels<T>& kernels, const RescaleArgs<T>& args, int64_t rows, bool pooled) {
  const int64_t scratch = (4 + 2 * args.pool.kh * args.pool.kw) * args.pool.ow;
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<T> memory(static_cast<size_t>(scratch));
    RescaleArgs<T> local = args;
    local.scratch = memory.data();
    (pooled ? kernels.rescale : kernels.secant)(local, begin, end);
  });
}

Tensor rescale(const Tensor& z, const Tensor& reference, const Ints& pool, bool relu, double eps) {
  Tensor out = rescale_result(z, reference, pool, relu);
  if (out.numel() == 0) return out;
  const Isa& isa = current_isa();
  const int64_t rows = z.size(0) * z.size(1);
  if (z.scalar_type() == ScalarType::Float)
    launch_rescale<float>(isa.f32, rescale_args<float>(z, reference, pool, relu, eps, out), rows, !pool.empty());
  else launch_rescale<double>(isa.f64, rescale_args<double>(z, reference, pool, relu, eps, out), rows, !pool.empty());
  return out;
}

constexpr int64_t kStatisticsGrain = int64_t(1) << 15;  // the least numbers per thread; they are in the cache

// Clears finite[i] of samples with NaN or Inf among `rows`, or NaN among `outputs`.
template <class T>
void mark_finite(const Kernels<T>& kernels, const Tensor& rows, const Tensors& outputs, uint8_t* finite) {
  const int64_t samples = rows.size(0), size = rows.numel() / samples;
  parallel_for(samples, std::max<int64_t>(1, kStatisticsGrain / size), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      bool good = kernels.all_finite(data<T>(rows) + n * size, size);
      for (const Tensor& y : outputs) {
        const T* row = data<T>(y) + n * y.size(1);
        for (int64_t i = 0; i < y.size(1); ++i) good &= row[i] == row[i];
      }
      finite[n] = finite[n] && good;
    }
  });
}

void check_chain(const Tensors& chain) {
  GRADKERN_CHECK(chain.size() == 4, "gradkern: a chain is weights, tables and two lists of records, got ", chain.size(),
                 " tensors");
}

// Runs a few samples at a time, and adds their results to the statistics while they are in the cache.
void chain_statistics(const Tensors& inputs, const Tensors& chain, const Ints& sizes, const Tensors& outputs,
                      const Tensor& targets, const std::optional<Tensor>& seed_rows, int64_t seed_tile,
                      const Tensor& room, const Tensors& sums, const Tensor& groups, const Tensor& finite, bool skip,
                      bool magnitude) {
  check_chain(chain);
  const Tensor &packed = chain[0], &tables = chain[1], &forward = chain[2], &backward = chain[3];
  GRADKERN_CHECK(!inputs.empty() && targets.dim() == 1 && room.dim() >= 2 && room.numel() > 0,
                 "gradkern: statistics need an input, targets [S] and room for some samples, got ", inputs.size(),
                 " inputs, targets ", targets.sizes(), " and room ", room.sizes());
  const int64_t samples = inputs[0].size(0), most = room.size(0);
  GRADKERN_CHECK(finite.scalar_type() == ScalarType::Bool && finite.is_contiguous() && finite.numel() == samples,
                 "gradkern: finite must be contiguous bool [", samples, "], got ", finite.scalar_type(), " ",
                 finite.sizes());
  const Statistics to(sums, groups, samples, room.numel() / most);
  uint8_t* const good = static_cast<uint8_t*>(finite.mutable_data_ptr());
  for (int64_t first = 0; first < samples; first += most) {
    const int64_t n = std::min(most, samples - first);
    Tensors x, y;
    for (const Tensor& t : inputs) x.push_back(torch::stable::narrow(const_cast<Tensor&>(t), 0, first, n));
    for (const Tensor& t : outputs) y.push_back(torch::stable::narrow(const_cast<Tensor&>(t), 0, first, n));
    const Tensor rows = torch::stable::narrow(const_cast<Tensor&>(room), 0, 0, n);
    chain_vjp<CpuSizes, run>(x, packed, tables, forward, backward, sizes, y, targets, seed_rows, {}, seed_tile, {rows});
    if (packed.scalar_type() == ScalarType::Float) mark_finite(current_isa().f32, rows, y, good + first);
    else mark_finite(current_isa().f64, rows, y, good + first);
    to.add(rows, first, skip ? good + first : nullptr, magnitude, kStatisticsGrain);
  }
}

// One op for the hash and the chain, because dispatching an op takes longer than hashing the weights of a small
// network.
int64_t chain_vjp_if(const Tensors& live, int64_t content, const Tensors& inputs, const Tensors& chain,
                     const Ints& sizes, const Tensors& outputs, const Tensor& targets,
                     const std::optional<Tensor>& seed_rows, int64_t seed_tile, const Tensors& results) {
  check_chain(chain);
  const int64_t found = content_hash(live);
  if (found == content)
    chain_vjp<CpuSizes, run>(inputs, chain[0], chain[1], chain[2], chain[3], sizes, outputs, targets, seed_rows, {},
                             seed_tile, results);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gradkern, m) {
  // `chain_vjp` for targets [S], if `content_hash` of `live` is `content`; returns that hash.  `chain`: packed weights,
  // tables, forward and backward records.
  m.def(
      "chain_vjp_if(Tensor[] live, int content, Tensor[] inputs, Tensor[] chain, int[] sizes, Tensor(a!)[] outputs, "
      "Tensor targets, Tensor? seed_rows, int seed_tile, Tensor(b!)[] results) -> int");
  // `chain_vjp` for targets [S], a few samples at a time: as many as `room` [n, S, size] has room for.  Their results
  // are not kept, but added to `sums` as by `accumulate`; `magnitude`: sums[0] is of absolute values, too.  finite[i]
  // of the samples [N] is cleared where a result is NaN or Inf, or an output NaN; with `skip` such samples do not
  // count.  `chain`: as above.
  m.def(
      "chain_statistics(Tensor[] inputs, Tensor[] chain, int[] sizes, Tensor(a!)[] outputs, Tensor targets, "
      "Tensor? seed_rows, int seed_tile, Tensor(b!) room, Tensor(c!)[] sums, Tensor groups, Tensor(d!) finite, "
      "bool skip, bool magnitude) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("chain_statistics", TORCH_BOX(&chain_statistics));
  m.impl("chain_vjp_if", TORCH_BOX(&chain_vjp_if));
  m.impl("rescale", TORCH_BOX(&rescale));
  m.impl("chain_forward", TORCH_BOX((&chain_forward<CpuSizes, run>)));
  m.impl("chain_vjp", TORCH_BOX((&chain_vjp<CpuSizes, run>)));
}

}  // namespace gradkern
