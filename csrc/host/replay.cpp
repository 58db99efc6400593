// Repeats one recorded launch, for the sanitizers.  Usage: replay INPUT OUTPUT
//
// INPUT holds eight int64 (0: a chain, 1: DeepLift's multipliers; bytes per number, whether there is a pool, blocks,
// threads, bytes of shared memory or windows, bytes of the arguments, blobs), the arguments with every pointer replaced
// by the number of a blob plus one, and the blobs as (bytes, content).  OUTPUT gets the blobs again, in the same form,
// as they are after the launch.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../cuda/kernels.h"
#include "../rescale_rule.h"

using gradkern::RescaleArgs;
using gradkern::cuda::Args;

extern "C" {
const char* gk_run_f32(const Args<float>*, int, int, int64_t);
const char* gk_run_f64(const Args<double>*, int, int, int64_t);
void gk_rescale_f32(const RescaleArgs<float>*, int64_t, int, int, int);
void gk_rescale_f64(const RescaleArgs<double>*, int64_t, int, int, int);
}

namespace {

struct Blob {
  int64_t bytes;
  std::unique_ptr<char, void (*)(void*)> data;  // of exactly this size, so that an access past the end is noticed
};

void need(bool ok) {
  if (ok) return;
  std::fprintf(stderr, "replay: the input is cut short\n");
  std::exit(2);
}

// The arguments, their first `pointers` words pointing at blobs.
template <class A>
A arguments(std::vector<char>& raw, const std::vector<Blob>& blobs, size_t pointers) {
  need(raw.size() == sizeof(A));
  for (size_t i = 0; i < pointers; ++i) {
    int64_t number;
    std::memcpy(&number, raw.data() + 8 * i, 8);
    char* const at = number ? blobs[static_cast<size_t>(number - 1)].data.get() : nullptr;
    std::memcpy(raw.data() + 8 * i, &at, 8);
  }
  A args;
  std::memcpy(&args, raw.data(), sizeof args);
  return args;
}

// The error text, or null.
template <class T, class Chain, class Rescale>
const char* launch(std::vector<char>& raw, const std::vector<Blob>& blobs, const int64_t (&head)[8], Chain chain,
                   Rescale rescale) {
  const int pooled = static_cast<int>(head[2]), blocks = static_cast<int>(head[3]), threads = static_cast<int>(head[4]);
  if (head[0] == 0) {
    const auto args = arguments<Args<T>>(raw, blobs, offsetof(Args<T>, target_n) / sizeof(void*));
    return chain(&args, blocks, threads, head[5]);
  }
  const auto args = arguments<RescaleArgs<T>>(raw, blobs, offsetof(RescaleArgs<T>, ref_rows) / sizeof(void*));
  rescale(&args, head[5], pooled, blocks, threads);
  return nullptr;
}

}  // namespace

int main(int count, char** words) {
  need(count == 3);
  std::FILE* in = std::fopen(words[1], "rb");
  need(in != nullptr);
  int64_t head[8];
  need(std::fread(head, 8, 8, in) == 8);
  std::vector<char> raw(static_cast<size_t>(head[6]));
  need(std::fread(raw.data(), 1, raw.size(), in) == raw.size());
  std::vector<Blob> blobs;
  for (int64_t i = 0; i < head[7]; ++i) {
    int64_t bytes;
    need(std::fread(&bytes, 8, 1, in) == 1);
    const size_t size = static_cast<size_t>(bytes);
    Blob blob{bytes, {static_cast<char*>(std::malloc(size ? size : 1)), std::free}};
    need(std::fread(blob.data.get(), 1, size, in) == size);
    blobs.push_back(std::move(blob));
  }
  std::fclose(in);
  const char* const error = head[1] == 4 ? launch<float>(raw, blobs, head, gk_run_f32, gk_rescale_f32)
                                         : launch<double>(raw, blobs, head, gk_run_f64, gk_rescale_f64);
  if (error) std::fprintf(stderr, "replay: %s\n", error);
  if (error) return 3;
  std::FILE* out = std::fopen(words[2], "wb");
  need(out != nullptr);
  for (const Blob& blob : blobs) {
    std::fwrite(&blob.bytes, 8, 1, out);
    std::fwrite(blob.data.get(), 1, static_cast<size_t>(blob.bytes), out);
  }
  std::fclose(out);
}
