// What the launcher, which knows torch, and the kernels, which do not, say to each other.
#pragma once
#include <cstddef>

#include "args.h"

namespace gradkern::cuda {

// `Math`: kPlain, or for float another of args.h.
template <class T, int Math>
const char* prepare_chain(int bytes);

template <class T, int Math>
const char* launch_chain(const Args<T>& args, int blocks, int threads, size_t shared, void* stream);

}  // namespace gradkern::cuda
