// Repeats recorded calls of the CPU's ops, for the sanitizers.  Usage: replay_cpu RECORDING OUTPUT MUTATIONS THREADS
//
// RECORDING holds, for each call, the bytes of the op's name, the name, the bytes of the arguments, and these as
// standin/torch/csrc/stable/library.h reads them.  OUTPUT gets all tensors of a call, arguments and then results, as
// (bytes, content).  With MUTATIONS, each call of a chain is repeated that many times, each with one to three numbers
// of its records, tables, sizes and lengths changed: it must end, or raise an error.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>

#include "../record_fields.h"
#include "../torch_abi.h"

using namespace torch::stable;
using torch::headeronly::ScalarType;

namespace {

constexpr int64_t kMostScratch = int64_t(1) << 24;  // numbers: a larger size is right, and takes long to clear
std::mt19937_64 generator(1);

int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }

int64_t changed(int64_t x, int64_t other) {
  switch (below(9)) {
    case 0: return 0;
    case 1: return x + 1;
    case 2: return x - 1;
    case 3: return x * 2 + 1;
    case 4: return x / 2;
    case 5: return other;
    case 6: return below(64);
    case 7: return -1 - below(70);
    default: return int64_t(1) << (20 + below(43));
  }
}

// The same content with another shape: shorter, or with the last axes otherwise.
Tensor reshaped(const Tensor& t) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  if (sizes.empty() || t.numel() == 0) return t;
  int64_t& size = sizes[static_cast<size_t>(below(static_cast<int64_t>(sizes.size())))];
  size = below(2) ? size - 1 : below(size + 1);
  Tensor made(sizes, t.scalar_type());
  std::memcpy(made.mutable_data_ptr(), t.const_data_ptr(), std::min(made.bytes(), t.bytes()));
  return made;
}

template <class I>
void change_one(I* x, int64_t count, int64_t i) {
  x[i] = static_cast<I>(changed(x[i], x[below(count)]));
}

void mutate(std::vector<Tensor*>& tensors, std::vector<std::vector<int64_t>*>& lists, std::vector<int64_t*>& numbers) {
  for (int64_t k = 1 + below(3); k > 0; --k) {
    if (!lists.empty() && below(8) == 0) {
      auto& sizes = *lists[static_cast<size_t>(below(static_cast<int64_t>(lists.size())))];
      if (!sizes.empty())
        change_one(sizes.data(), static_cast<int64_t>(sizes.size()), below(static_cast<int64_t>(sizes.size())));
      continue;
    }
    if (!numbers.empty() && below(30) == 0) {
      *numbers[0] = changed(*numbers[0], 7);
      continue;
    }
    Tensor*& t = tensors[static_cast<size_t>(below(static_cast<int64_t>(tensors.size())))];
    const bool integers = t->scalar_type() == ScalarType::Long || t->scalar_type() == ScalarType::Int;
    if (t->numel() == 0 || (!integers && below(6))) continue;
    if (!integers || below(12) == 0) {
      *t = reshaped(*t);
      continue;
    }
    int64_t i = below(t->numel());
    if (t->scalar_type() == ScalarType::Int) {
      change_one(static_cast<int32_t*>(t->mutable_data_ptr()), t->numel(), i);
      continue;
    }
    auto* x = static_cast<int64_t*>(t->mutable_data_ptr());
    if (t->dim() == 2 && t->size(1) == gradkern::kRecordWidth) {  // mostly fields that the record has
      const int64_t row = i / gradkern::kRecordWidth * gradkern::kRecordWidth, kind = x[row];
      if (kind >= 0 && kind < static_cast<int64_t>(std::size(gradkern::kFields)) && below(10))
        i = row + below(static_cast<int64_t>(std::strlen(gradkern::kFields[kind].letters)));
    }
    change_one(x, t->numel(), i);
  }
  for (auto* sizes : lists)
    for (int64_t& s : *sizes)
      if (s > kMostScratch) s %= kMostScratch;
}

void write(std::ofstream& out, const Tensor& t) {
  const auto bytes = static_cast<int64_t>(t.bytes());
  out.write(reinterpret_cast<const char*>(&bytes), 8);
  out.write(static_cast<const char*>(t.const_data_ptr()), bytes);
}

}  // namespace

int main(int count, char** words) {
  if (count != 5) return 2;
  std::ifstream file(words[1], std::ios::binary);
  const std::vector<char> all{std::istreambuf_iterator<char>(file), {}};
  std::ofstream out(words[2], std::ios::binary);
  const int64_t mutations = std::atoll(words[3]);
  thread_count() = std::atoll(words[4]);
  int64_t calls = 0, refused = 0, ended = 0;
  for (const char *at = all.data(), *end = at + all.size(); at < end; ++calls) {
    int64_t bytes;
    const auto next = [&] {
      std::memcpy(&bytes, at, 8);
      at += 8 + bytes;
      return at - bytes;
    };
    const char* const letters = next();  // before the count is read
    const std::string name(letters, static_cast<size_t>(bytes));
    const char* const from = next();
    const auto& op = standin::ops().at(name);
    standin::Arguments arguments(from, at);
    for (const Tensor& t : op(arguments, nullptr)) arguments.tensors.push_back(t);
    for (const Tensor& t : arguments.tensors) write(out, t);
    for (int64_t k = 0; k < (name.starts_with("chain_") ? mutations : 0); ++k) {
      standin::Arguments again(from, at);
      try {
        op(again, mutate);
        ++ended;
      } catch (const std::exception&) { ++refused; }
    }
  }
  std::printf("%lld calls, %lld changed: %lld refused, %lld ended\n", static_cast<long long>(calls),
              static_cast<long long>(refused + ended), static_cast<long long>(refused), static_cast<long long>(ended));
}
