// A check, before a kernel runs, of all memory that the records of a chain refer to.
#pragma once
#include "../chain_call.h"
#include "../records.h"

namespace gradkern {

// Raises an error that names the record unless every element that a record reads or writes exists: in scratch memory,
// the weights, the tables and the caller's tensors.  Chains that passed are remembered by content, so a repeated call
// costs one pass over its records and tables.
void check_records(const ChainCall& call, const CpuSizes& sizes, int64_t lanes);

}  // namespace gradkern
