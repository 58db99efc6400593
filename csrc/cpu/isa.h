// The ISA table: one entry per translation unit, best first.
#pragma once
#include "context.h"

namespace gradkern {

extern const Isa kAvx512, kAvx2, kPortable;

// Null-terminated, best first; the first supported one is used unless GRADKERN_ISA names another.
const Isa* const* isa_table();
const Isa& current_isa();
const Isa* find_isa(const char* name);

}  // namespace gradkern
