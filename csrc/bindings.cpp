// Everything except the tensor ops: build facts, CPU capabilities, and the record layout that Python compares with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "elementwise.h"

namespace py = pybind11;

namespace {

// Large results are fresh memory from the system, and faulting it in page by page can cost as much as computing them.
void advise_huge(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // failure is not an error
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

#ifdef GRADKERN_WITH_CUDA
#define GK_TEXT_OF(x) #x
#define GK_TEXT(x) GK_TEXT_OF(x)
namespace gradkern::cuda {
std::vector<int64_t> describe_device(int device);  // csrc/cuda/launch.cpp
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "gradkern's compiled part: registers the ops torch.ops.gradkern.* and tells what was built";
  m.attr("record_layout") = gradkern::kRecordLayout;
  m.def("functions", [] {
    return std::vector<std::string>{
#define X(name) #name,
        GRADKERN_FUNCTIONS(X)
#undef X
    };
  });
  m.def("isa", [] { return std::string(gradkern::current_isa().name); }, "The instruction set in use");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (auto isa = gradkern::isa_table(); *isa; ++isa)
          if ((*isa)->supported()) names.emplace_back((*isa)->name);
        return names;
      },
      "The instruction sets that this processor can run, best first");
  m.def("vector_bytes", [] { return gradkern::current_isa().vector_bytes; });
  m.def("advise_huge", advise_huge, "Ask the system for huge pages for a fresh allocation");
#ifdef GRADKERN_WITH_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_fingerprint") = GK_TEXT(GRADKERN_CUDA_FINGERPRINT);  // of the sources, setup.py
  m.def("describe_device", gradkern::cuda::describe_device, "What the planner has to know of a GPU");
#else
  m.attr("cuda") = false;
#endif
}
