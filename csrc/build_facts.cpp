// Ops without tensors: what was built, what the processor can run, and the record layout that Python compares with.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/isa.h"
#include "elementwise.h"
#include "records.h"
#include "torch_abi.h"

#ifdef GRADKERN_WITH_CUDA
#define GK_TEXT_OF(x) #x
#define GK_TEXT(x) GK_TEXT_OF(x)
namespace gradkern::cuda {
std::vector<int64_t> describe_device(int64_t device);  // csrc/cuda/launch.cpp
}
#endif

namespace gradkern {

namespace {

// Large results are fresh memory from the system, and faulting it in page by page can cost as much as computing them.
void advise_huge(int64_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const auto start = static_cast<uintptr_t>(address);
  const uintptr_t begin = (start + kPage - 1) / kPage * kPage;
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // failure is not an error
#else
  (void)address, (void)bytes;
#endif
}

std::string record_layout() { return kRecordLayout; }

std::vector<std::string> functions() {
  return {
#define X(name) #name,
      GRADKERN_FUNCTIONS(X)
#undef X
  };
}

std::string isa() { return current_isa().name; }
int64_t vector_bytes() { return current_isa().vector_bytes; }
int64_t tile_vectors() { return current_isa().tile_vectors; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (auto isa = isa_table(); *isa; ++isa)
    if ((*isa)->supported()) names.emplace_back((*isa)->name);
  return names;
}

bool has_cuda() {
#ifdef GRADKERN_WITH_CUDA
  return true;
#else
  return false;
#endif
}

std::string cuda_fingerprint() {
#ifdef GRADKERN_WITH_CUDA
  return GK_TEXT(GRADKERN_CUDA_FINGERPRINT);
#else
  return "none";
#endif
}

std::vector<int64_t> describe_device(int64_t device) {
#ifdef GRADKERN_WITH_CUDA
  return cuda::describe_device(device);
#else
  throw std::runtime_error(text("gradkern: asked about GPU ", device, ", but this build has no CUDA part"));
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gradkern, m) {
  m.def("record_layout() -> str");
  m.def("functions() -> str[]");                       // elementwise functions, in the order of their numbers
  m.def("isa() -> str");                               // the instruction set in use
  m.def("isas() -> str[]");                            // those that this processor can run, best first
  m.def("vector_bytes() -> int");                      // bytes of a vector register of the set in use
  m.def("tile_vectors() -> int");                      // vectors of output channels in a tile of forward weights
  m.def("advise_huge(int address, int bytes) -> ()");  // asks the system for huge pages for a fresh allocation
  m.def("has_cuda() -> bool");
  m.def("cuda_fingerprint() -> str");             // of the CUDA sources, by setup.py
  m.def("describe_device(int device) -> int[]");  // what the planner has to know of a GPU, csrc/cuda/launch.cpp
}

STABLE_TORCH_LIBRARY_IMPL(gradkern, CompositeExplicitAutograd, m) {
  m.impl("record_layout", TORCH_BOX(&record_layout));
  m.impl("functions", TORCH_BOX(&functions));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isas", TORCH_BOX(&isas));
  m.impl("vector_bytes", TORCH_BOX(&vector_bytes));
  m.impl("tile_vectors", TORCH_BOX(&tile_vectors));
  m.impl("advise_huge", TORCH_BOX(&advise_huge));
  m.impl("has_cuda", TORCH_BOX(&has_cuda));
  m.impl("cuda_fingerprint", TORCH_BOX(&cuda_fingerprint));
  m.impl("describe_device", TORCH_BOX(&describe_device));
}

}  // namespace gradkern
