// CPU launch of a chain: blocks of samples over torch's own threads, one piece of scratch memory per thread.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../checks.h"
#include "isa.h"

namespace gradkern {

const Isa* const* isa_table() {
  static const Isa* const table[] = {
#if defined(__x86_64__) || defined(_M_X64)
      &kAvx512, &kAvx2,
#endif
      &kPortable, nullptr};
  return table;
}

const Isa* find_isa(const char* name) {
  for (const Isa* const* isa = isa_table(); *isa; ++isa)
    if (std::strcmp((*isa)->name, name) == 0) return *isa;
  return nullptr;
}

// Weights are packed for one vector length, so the choice is made once per process.
const Isa& current_isa() {
  static const Isa* const chosen = [] {
    const char* wanted = std::getenv("GRADKERN_ISA");
    if (wanted && *wanted) {
      const Isa* isa = find_isa(wanted);
      TORCH_CHECK(isa, "gradkern: GRADKERN_ISA=", wanted, " is unknown; use avx512, avx2 or portable");
      TORCH_CHECK(isa->supported(), "gradkern: GRADKERN_ISA=", wanted, " is not supported by this processor");
      return isa;
    }
    const Isa* const* isa = isa_table();
    while (!(*isa)->supported()) ++isa;
    return *isa;
  }();
  return *chosen;
}

namespace {

// One thread's memory, kept between calls while it is small: a single sample must not pay for page faults.
class Scratch {
 public:
  char* take(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;  // also where the next line throws
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      TORCH_CHECK(memory_, "gradkern: out of memory for ", bytes, " bytes of scratch");
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

template <class T>
void launch(const Kernels<T>& kernels, at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables,
            const at::Tensor& forward, const at::Tensor& backward, const CpuSizes& sizes, at::IntArrayRef output_sizes,
            const at::Tensor& targets, const at::Tensor& seed_rows, at::TensorList cotangents, int64_t seed_tile,
            at::TensorList outputs, at::TensorList results) {
  const int64_t samples = inputs[0].size(0);
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::max<int64_t>(1, std::min(sizes.block, (samples + threads - 1) / threads));
  const int64_t blocks = (samples + block - 1) / block;
  const int64_t seeds = backward.size(0) == 0 ? 0 : targets.defined() ? targets.size(-1) : cotangents[0].size(1);
  const auto round = [](int64_t x) { return (x + 63) / 64 * 64; };
  const int64_t elements = round(sizes.shared + block * sizes.sample + 64);
  const int64_t bits = round(block * sizes.bits + 64);
  const int64_t entries = round(sizes.entries + 64), segments = sizes.segments + 8;
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(T)) + bits + entries * 4 +
                        segments * static_cast<int64_t>(sizeof(Segment));

  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    char* memory = scratch.take(static_cast<size_t>(bytes));
    Context<T> ctx{};
    ctx.buf = reinterpret_cast<T*>(memory);
    ctx.bits = reinterpret_cast<uint8_t*>(memory + elements * sizeof(T));
    ctx.bits_sample = sizes.bits;
    ctx.segments = reinterpret_cast<Segment*>(ctx.bits + bits);
    ctx.channels = reinterpret_cast<uint16_t*>(ctx.segments + segments);
    ctx.weight_rows = ctx.channels + entries;
    ctx.packed = packed.const_data_ptr<T>();
    ctx.tables = tables.const_data_ptr<int32_t>();
    // Halos and slack must be zero, and stay so: ops write interiors only.
    std::memset(memory, 0, static_cast<size_t>(elements * sizeof(T) + bits));

    std::vector<const T*> in(inputs.size()), cot(cotangents.size());
    std::vector<T*> out(outputs.size()), res(results.size());
    std::vector<int64_t> in_n(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) in_n[i] = inputs[i].numel() / std::max<int64_t>(samples, 1);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t n0 = b * block;
      ctx.samples = std::min(block, samples - n0);
      for (size_t i = 0; i < inputs.size(); ++i) in[i] = inputs[i].const_data_ptr<T>() + n0 * in_n[i];
      for (size_t i = 0; i < outputs.size(); ++i) out[i] = outputs[i].mutable_data_ptr<T>() + n0 * output_sizes[i];
      ctx.inputs = in.data();
      ctx.input_n = in_n.data();
      ctx.outputs = out.data();
      ctx.output_n = output_sizes.data();
      kernels.run(static_cast<const Record*>(forward.const_data_ptr()), forward.size(0), ctx);
      for (int64_t s0 = 0; s0 < seeds; s0 += seed_tile) {
        ctx.seeds = std::min(seed_tile, seeds - s0);
        ctx.seeds_total = seeds;
        if (targets.defined()) {
          ctx.target_n = targets.dim() == 2 ? seeds : 0;
          ctx.targets = targets.const_data_ptr<int64_t>() + n0 * ctx.target_n + s0;
        }
        if (seed_rows.defined()) {
          ctx.seed_rows_s = seed_rows.size(-1);
          ctx.seed_rows_n = seed_rows.dim() == 3 ? seeds * ctx.seed_rows_s : 0;
          ctx.seed_rows = seed_rows.const_data_ptr<T>() + n0 * ctx.seed_rows_n + s0 * ctx.seed_rows_s;
        }
        for (size_t i = 0; i < results.size(); ++i) {
          const int64_t size = results[i].numel() / std::max<int64_t>(samples * seeds, 1);
          res[i] = results[i].mutable_data_ptr<T>() + (n0 * seeds + s0) * size;
        }
        for (size_t i = 0; i < cotangents.size(); ++i) {
          const int64_t size = cotangents[i].numel() / std::max<int64_t>(samples * seeds, 1);
          cot[i] = cotangents[i].const_data_ptr<T>() + (n0 * seeds + s0) * size;
        }
        ctx.results = res.data();
        ctx.cotangents = cot.data();
        kernels.run(static_cast<const Record*>(backward.const_data_ptr()), backward.size(0), ctx);
      }
    }
    scratch.trim();
  });
}

void run(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables, const at::Tensor& forward,
         const at::Tensor& backward, const CpuSizes& sizes, const at::Tensor& targets, const at::Tensor& seed_rows,
         at::TensorList cotangents, int64_t seed_tile, at::TensorList outputs, at::TensorList results) {
  if (inputs[0].size(0) == 0) return;
  std::vector<int64_t> output_sizes;
  for (const at::Tensor& y : outputs) output_sizes.push_back(y.size(1));
  const Isa& isa = current_isa();
  if (packed.scalar_type() == at::kFloat)
    launch<float>(isa.f32, inputs, packed, tables, forward, backward, sizes, output_sizes, targets, seed_rows,
                  cotangents, seed_tile, outputs, results);
  else if (packed.scalar_type() == at::kDouble)
    launch<double>(isa.f64, inputs, packed, tables, forward, backward, sizes, output_sizes, targets, seed_rows,
                   cotangents, seed_tile, outputs, results);
  else TORCH_CHECK(false, "gradkern: the CPU kernels take float32 or float64, got ", packed.scalar_type());
}

std::vector<at::Tensor> chain_forward(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables,
                                      const at::Tensor& forward, at::IntArrayRef sizes, at::IntArrayRef output_sizes) {
  check_chain(inputs, packed, tables, forward, forward);
  std::vector<at::Tensor> outputs;
  for (const int64_t size : output_sizes) outputs.push_back(at::empty({inputs[0].size(0), size}, inputs[0].options()));
  run(inputs, packed, tables, forward, forward.slice(0, 0, 0), sizes_of<CpuSizes>(sizes), {}, {}, {}, 1, outputs, {});
  return outputs;
}

void chain_vjp(at::TensorList inputs, const at::Tensor& packed, const at::Tensor& tables, const at::Tensor& forward,
               const at::Tensor& backward, at::IntArrayRef sizes, at::TensorList outputs,
               const std::optional<at::Tensor>& targets, const std::optional<at::Tensor>& seed_rows,
               at::TensorList cotangents, int64_t seed_tile, at::TensorList results) {
  const at::Tensor t = targets.value_or(at::Tensor()), rows = seed_rows.value_or(at::Tensor());
  check_chain(inputs, packed, tables, forward, backward);
  check_seeds(inputs, packed, outputs, t, rows, cotangents, seed_tile, results);
  run(inputs, packed, tables, forward, backward, sizes_of<CpuSizes>(sizes), t, rows, cotangents, seed_tile, outputs,
      results);
}

template <class T>
void launch_rescale(const Kernels<T>& kernels, const SharesArgs<T>& args, int64_t rows, bool pooled) {
  const int64_t scratch = (4 + 2 * args.pool.kh * args.pool.kw) * args.pool.ow;
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<T> memory(static_cast<size_t>(scratch));
    SharesArgs<T> mine = args;
    mine.scratch = memory.data();
    (pooled ? kernels.shares : kernels.secant)(mine, begin, end);
  });
}

at::Tensor rescale(const at::Tensor& z, const at::Tensor& reference, at::IntArrayRef pool, bool relu, double eps) {
  at::Tensor out = rescaled(z, reference, pool, relu);
  if (out.numel() == 0) return out;
  const Isa& isa = current_isa();
  const int64_t rows = z.size(0) * z.size(1);
  if (z.scalar_type() == at::kFloat)
    launch_rescale<float>(isa.f32, shares_args<float>(z, reference, pool, relu, eps, out), rows, !pool.empty());
  else launch_rescale<double>(isa.f64, shares_args<double>(z, reference, pool, relu, eps, out), rows, !pool.empty());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gradkern, CPU, m) {
  m.impl("rescale", rescale);
  m.impl("chain_forward", chain_forward);
  m.impl("chain_vjp", chain_vjp);
}

}  // namespace gradkern
