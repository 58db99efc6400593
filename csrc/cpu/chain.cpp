// CPU launch of a chain: torch's own threads process blocks of samples, each with its own scratch memory.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../op_bodies.h"
#include "isa.h"

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
      size_ = 0;  // also if the next line throws
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

// The caller's tensors as seen by one thread's kernels, from a block's first sample and a tile's first seed on.
template <class T>
class Ports {
 public:
  Ports(const ChainCall& call, Context<T>& context)
      : call_(call),
        context_(context),
        inputs_(call.inputs.size()),
        cotangents_(call.cotangents.size()),
        outputs_(call.outputs.size()),
        results_(call.results.size()) {
    for (const Tensor& x : call.inputs) input_n_.push_back(x.numel() / call.samples());
    for (const Tensor& y : call.outputs) output_n_.push_back(y.size(1));
    context.inputs = inputs_.data(), context.input_n = input_n_.data();
    context.outputs = outputs_.data(), context.output_n = output_n_.data();
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
  void go_to_seeds(int64_t first, int64_t seed, int64_t seeds) {
    context_.seeds = seeds;
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

template <class T>
void launch(const Kernels<T>& kernels, const ChainCall& call, const CpuSizes& sizes) {
  const int64_t samples = call.samples(), seeds = call.seeds(), threads = torch::stable::get_num_threads();
  const int64_t block = std::max<int64_t>(1, std::min(sizes.block, (samples + threads - 1) / threads));
  const int64_t blocks = (samples + block - 1) / block;
  const auto round = [](int64_t x) { return (x + 63) / 64 * 64; };
  const int64_t elements = round(sizes.shared + block * sizes.sample + 64);
  const int64_t bits = round(block * sizes.bits + 64);
  const int64_t entries = round(sizes.entries + 64), segments = sizes.segments + 8;
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(T)) + bits + entries * 4 +
                        segments * static_cast<int64_t>(sizeof(Segment));
  const auto* forward = data<Record>(call.forward);
  const auto* backward = call.backward ? data<Record>(*call.backward) : nullptr;

  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
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
    Ports<T> ports(call, ctx);
    for (int64_t b = begin; b < end; ++b) {
      ports.go_to_block(b * block, std::min(block, samples - b * block));
      kernels.run(forward, call.forward.size(0), ctx);
      for (int64_t s = 0; s < seeds; s += call.seed_tile) {
        ports.go_to_seeds(b * block, s, std::min(call.seed_tile, seeds - s));
        kernels.run(backward, call.backward->size(0), ctx);
      }
    }
    scratch.trim();
  });
}

void run(const ChainCall& call, const CpuSizes& sizes) {
  const Isa& isa = current_isa();
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("rescale", TORCH_BOX(&rescale));
  m.impl("chain_forward", TORCH_BOX((&chain_forward<CpuSizes, run>)));
  m.impl("chain_vjp", TORCH_BOX((&chain_vjp<CpuSizes, run>)));
}

}  // namespace gradkern
