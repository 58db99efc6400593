// Runs one call of a chain by the NEON kernels, on one thread and without torch: for an emulator.
// Usage: chain_run INPUT OUTPUT
//
// INPUT holds int64: bytes per number, samples, seeds, seeds of a tile, whether there are targets, their stride,
// whether there are rows of the last weight, their strides by sample and seed, the numbers of inputs, outputs,
// cotangents and results, and the sizes of scratch memory; then forward and backward records, weights, tables, targets,
// rows, inputs, outputs, cotangents and results, each as (bytes, content).  OUTPUT gets the content of outputs and
// results.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../cpu/isa.h"

namespace {

using namespace gradkern;
using Blob = std::vector<char>;

struct Head {
  int64_t bytes, samples, seeds, tile, targets, target_n, rows, rows_n, rows_s, inputs, outputs, cotangents, results;
  CpuSizes sizes;
};

void read(std::FILE* file, void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, file) != 1) {
    std::fprintf(stderr, "chain_run: the input is cut short\n");
    std::exit(2);
  }
}

template <class T>
T* numbers(Blob& blob) {
  return reinterpret_cast<T*>(blob.data());
}

template <class T>
void run(const Kernels<T>& kernels, const Head& head, std::vector<Blob>& blobs) {
  const CpuSizes& sizes = head.sizes;
  Blob* const inputs = &blobs[6];
  Blob* const outputs = inputs + head.inputs;
  Blob* const cotangents = outputs + head.outputs;
  Blob* const results = cotangents + head.cotangents;
  std::vector<T> buf(static_cast<size_t>(sizes.shared + sizes.block * sizes.sample + 128));
  std::vector<uint8_t> bits(static_cast<size_t>(sizes.block * sizes.bits + 128));
  std::vector<uint16_t> channels(static_cast<size_t>(sizes.entries + 128)), rows(channels.size());
  std::vector<Segment> segments(static_cast<size_t>(sizes.segments + 8));
  std::vector<const T*> x(head.inputs), g(head.cotangents);
  std::vector<T*> y(head.outputs), r(head.results);
  std::vector<int64_t> x_n, y_n;
  const auto each = [&](const Blob& blob, int64_t rows) {
    return static_cast<int64_t>(blob.size() / sizeof(T)) / rows;
  };
  for (int64_t i = 0; i < head.inputs; ++i) x_n.push_back(each(inputs[i], head.samples));
  for (int64_t i = 0; i < head.outputs; ++i) y_n.push_back(each(outputs[i], head.samples));
  Context<T> ctx{};
  ctx.buf = buf.data(), ctx.bits = bits.data(), ctx.bits_sample = sizes.bits;
  ctx.channels = channels.data(), ctx.weight_rows = rows.data(), ctx.segments = segments.data();
  ctx.packed = numbers<T>(blobs[2]), ctx.tables = numbers<int32_t>(blobs[3]);
  ctx.inputs = x.data(), ctx.input_n = x_n.data(), ctx.outputs = y.data(), ctx.output_n = y_n.data();
  ctx.cotangents = g.data(), ctx.results = r.data(), ctx.seeds_total = head.seeds;
  ctx.target_n = head.target_n, ctx.seed_rows_n = head.rows_n, ctx.seed_rows_s = head.rows_s;
  const int64_t forward = blobs[0].size() / sizeof(Record), backward = blobs[1].size() / sizeof(Record);
  for (int64_t first = 0; first < head.samples; first += sizes.block) {
    ctx.samples = std::min(sizes.block, head.samples - first);
    for (int64_t i = 0; i < head.inputs; ++i) x[i] = numbers<T>(inputs[i]) + first * x_n[i];
    for (int64_t i = 0; i < head.outputs; ++i) y[i] = numbers<T>(outputs[i]) + first * y_n[i];
    kernels.run(numbers<Record>(blobs[0]), forward, ctx);
    for (int64_t seed = 0; seed < head.seeds; seed += head.tile) {
      ctx.seeds = ctx.tile_seeds = std::min(head.tile, head.seeds - seed);
      const int64_t row = first * head.seeds + seed, all = head.samples * head.seeds;
      if (head.targets) ctx.targets = numbers<int64_t>(blobs[4]) + first * head.target_n + seed;
      if (head.rows) ctx.seed_rows = numbers<T>(blobs[5]) + first * head.rows_n + seed * head.rows_s;
      for (int64_t i = 0; i < head.cotangents; ++i) g[i] = numbers<T>(cotangents[i]) + row * each(cotangents[i], all);
      for (int64_t i = 0; i < head.results; ++i) r[i] = numbers<T>(results[i]) + row * each(results[i], all);
      kernels.run(numbers<Record>(blobs[1]), backward, ctx);
    }
  }
}

}  // namespace

int main(int count, char** words) {
  std::FILE* const in = count == 3 ? std::fopen(words[1], "rb") : nullptr;
  if (!in) return 2;
  Head head;
  read(in, &head, sizeof head);
  std::vector<Blob> blobs(static_cast<size_t>(6 + head.inputs + head.outputs + head.cotangents + head.results));
  for (Blob& blob : blobs) {
    int64_t bytes;
    read(in, &bytes, sizeof bytes);
    blob.resize(static_cast<size_t>(bytes));
    read(in, blob.data(), blob.size());
  }
  std::fclose(in);
  const Isa& isa = gradkern::neon::kIsa;
  head.bytes == 4 ? run<float>(isa.f32, head, blobs) : run<double>(isa.f64, head, blobs);
  std::FILE* const out = std::fopen(words[2], "wb");
  if (!out) return 2;
  const size_t results = blobs.size() - static_cast<size_t>(head.results),
               outputs = static_cast<size_t>(6 + head.inputs);
  for (size_t i = outputs; i < blobs.size(); ++i)
    if (i < outputs + static_cast<size_t>(head.outputs) || i >= results)
      std::fwrite(blobs[i].data(), 1, blobs[i].size(), out);
  std::fclose(out);
}
