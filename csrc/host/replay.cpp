// One recorded launch, run again: what the sanitizers are built around.  Usage: replay INPUT OUTPUT
//
// INPUT holds seven int64 (bytes per number, products, blocks, threads, arena bytes, bytes of the arguments, blobs),
// the arguments with every pointer replaced by the number of a blob plus one, and the blobs as (bytes, content). OUTPUT
// gets the blobs again, in the same form, as they are after the launch.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../cuda/args.h"

extern "C" {
void gk_run_f32(const gradkern::cuda::Args<float>*, int, int, int, int64_t);
void gk_run_f64(const gradkern::cuda::Args<double>*, int, int, int, int64_t);
}

namespace {

struct Blob {
  int64_t bytes;
  std::unique_ptr<char, void (*)(void*)> data;  // exactly as large as it says, so that a byte too far shows
};

void need(bool ok) {
  if (ok) return;
  std::fprintf(stderr, "replay: the input is cut short\n");
  std::exit(2);
}

template <class T, class Run>
void launch(std::vector<char>& raw, const std::vector<Blob>& blobs, const int64_t (&head)[7], Run run) {
  using Args = gradkern::cuda::Args<T>;
  need(raw.size() == sizeof(Args));
  const size_t pointers = offsetof(Args, target_n) / sizeof(void*);
  for (size_t i = 0; i < pointers; ++i) {
    int64_t number;
    std::memcpy(&number, raw.data() + 8 * i, 8);
    char* const at = number ? blobs[static_cast<size_t>(number - 1)].data.get() : nullptr;
    std::memcpy(raw.data() + 8 * i, &at, 8);
  }
  Args args;
  std::memcpy(&args, raw.data(), sizeof args);
  run(&args, static_cast<int>(head[1]), static_cast<int>(head[2]), static_cast<int>(head[3]), head[4]);
}

}  // namespace

int main(int count, char** words) {
  need(count == 3);
  std::FILE* in = std::fopen(words[1], "rb");
  need(in != nullptr);
  int64_t head[7];
  need(std::fread(head, 8, 7, in) == 7);
  std::vector<char> raw(static_cast<size_t>(head[5]));
  need(std::fread(raw.data(), 1, raw.size(), in) == raw.size());
  std::vector<Blob> blobs;
  for (int64_t i = 0; i < head[6]; ++i) {
    int64_t bytes;
    need(std::fread(&bytes, 8, 1, in) == 1);
    const size_t size = static_cast<size_t>(bytes);
    Blob blob{bytes, {static_cast<char*>(std::malloc(size ? size : 1)), std::free}};
    need(std::fread(blob.data.get(), 1, size, in) == size);
    blobs.push_back(std::move(blob));
  }
  std::fclose(in);
  head[0] == 4 ? launch<float>(raw, blobs, head, gk_run_f32) : launch<double>(raw, blobs, head, gk_run_f64);
  std::FILE* out = std::fopen(words[2], "wb");
  need(out != nullptr);
  for (const Blob& blob : blobs) {
    std::fwrite(&blob.bytes, 8, 1, out);
    std::fwrite(blob.data.get(), 1, static_cast<size_t>(blob.bytes), out);
  }
  std::fclose(out);
}
