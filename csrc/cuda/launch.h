// What the launcher, which knows torch, and the kernels, which do not, say to each other.
#pragma once
#include <cstddef>

#include "args.h"

namespace gradkern::cuda {

// `Products` 0: contractions in T; 1 or 3: that many TF32 products (float alone).
template <class T, int Products>
const char* prepare_chain(int bytes);

template <class T, int Products>
const char* launch_chain(const Args<T>& args, int blocks, int threads, size_t shared, void* stream);

}  // namespace gradkern::cuda
