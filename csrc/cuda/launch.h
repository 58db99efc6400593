// What the launcher, which knows torch, and the kernels, which do not, say to each other.
#pragma once
#include <cstddef>

#include "args.h"

namespace gradkern::cuda {

// Lets the kernel use as much shared memory as the current device gives a block.  The error text, or null.
template <class T>
const char* prepare_chain(int bytes);

// The error text, or null.
template <class T>
const char* launch_chain(const Args<T>& args, int blocks, int threads, size_t shared, void* stream);

}  // namespace gradkern::cuda
