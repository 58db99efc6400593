// A check of everything that the records of a chain lead a kernel to, before one runs.
#pragma once
#include "../chain_call.h"
#include "../records.h"

namespace gradkern {

// Raises an error that names the record unless every element that a record reads or writes is there: in scratch memory,
// the weights, the tables and the caller's tensors.  What was found right is remembered by content, so a call that is
// repeated costs one pass over its records and tables.
void check_records(const ChainCall& call, const CpuSizes& sizes, int64_t lanes);

}  // namespace gradkern
