// The instruction sets that the interpreter is compiled for, chosen at run time.
#pragma once
#include "context.h"

// Best first: the first one that the processor has is used, unless GRADKERN_ISA names another.  Each has its own file,
// isa_<name>.cpp, which says which instructions the compiler may use, how long vectors are and how many registers there
// are; block sizes follow from these numbers.
#ifdef GRADKERN_ISAS  // some alone, for a sanitizer
#elif defined(__x86_64__) || defined(_M_X64)
#define GRADKERN_ISAS(X) X(avx512) X(avx2) X(avx) X(portable)
#elif defined(__aarch64__) || defined(_M_ARM64)
#define GRADKERN_ISAS(X) X(neon) X(portable)
#else
#define GRADKERN_ISAS(X) X(portable)
#endif

// GK_INTRINSICS of an instruction set: the hand-written comparisons in simd.h that it can use.
#define GK_NO_INTRINSICS 0
#define GK_AVX_INTRINSICS 1  // 256-bit, without integer vectors: AVX and AVX2
#define GK_AVX512_INTRINSICS 2
#define GK_NEON_INTRINSICS 3

namespace gradkern {

#define X(name)          \
  namespace name {       \
  extern const Isa kIsa; \
  }
GRADKERN_ISAS(X)
#undef X

const Isa* const* isa_table();  // null-terminated, best first
const Isa& current_isa();

}  // namespace gradkern
