// A hash of tensors' contents, computed on the CPU.
#pragma once
#include "torch_abi.h"

namespace gradkern {

// An order-sensitive hash of bytes, which continues `total`.
uint64_t hash_bytes(uint64_t total, const void* bytes, size_t size);

// An order-sensitive hash of the bytes of CPU tensors.
int64_t content_hash(const Tensors& tensors);

}  // namespace gradkern
