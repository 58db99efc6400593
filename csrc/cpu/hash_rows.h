// A hash of memory; included once per ISA, like body.h.
namespace {

// Words go to lanes that do not wait for one another.  A step is a bijection of the lane for a fixed word, and of the
// word for a fixed lane, so one changed word always changes its lane.
GK_INLINE uint64_t hash_step(uint64_t lane, uint64_t word) {
  // Only AVX-512 has a product of 64-bit numbers in vectors; the compiler's substitute is slower than one by one.
  __asm__("" : "+r"(lane));
  lane = (lane ^ word) * 0xff51afd7ed558ccdull;
  return lane << 31 | lane >> 33;
}

#if GK_INTRINSICS == GK_AVX512_INTRINSICS
typedef uint64_t HashLanes __attribute__((vector_size(GK_VECTOR_BYTES)));
typedef uint64_t HashWords __attribute__((vector_size(GK_VECTOR_BYTES), aligned(1), may_alias));
GK_INLINE HashLanes hash_step(HashLanes lane, HashLanes word) {
  lane = (lane ^ word) * 0xff51afd7ed558ccdull;
  return lane << 31 | lane >> 33;
}
#elif defined(GK_AES)
typedef __m128i HashLanes;
typedef long long HashWords __attribute__((vector_size(sizeof(__m128i)), aligned(1), may_alias));
GK_INLINE HashLanes hash_step(HashLanes lane, HashLanes word) {
  // The word goes in before the round, as in the other steps, so that the last words of a range, which take the scalar
  // step, cannot undo it.  Without a round key, sixteen equal bytes would stay equal.
  return _mm_aesenc_si128(lane ^ word, _mm_set1_epi64x(0x7f4a7c159e3779b9ll));
}
#else
typedef uint64_t HashLanes;
typedef uint64_t HashWords __attribute__((aligned(1), may_alias));
#endif

uint64_t run_hash(uint64_t total, const ByteRange* ranges, size_t count) {
  constexpr size_t kVectors = 8, kBlock = kVectors * sizeof(HashLanes), kWord = sizeof(uint64_t), kLine = 64;
  constexpr size_t kAhead = 2048;  // what the kernels of the last call have left in the third-level cache comes in time
  uint64_t lanes[kBlock / kWord];
  for (size_t l = 0; l < kBlock / kWord; ++l) lanes[l] = total + 0x9e3779b97f4a7c15ull * (l + 1);
  for (const ByteRange* range = ranges; range != ranges + count; ++range) {
    const char* const bytes = static_cast<const char*>(range->data);
    const size_t size = range->size;
    size_t i = 0;
    if (size >= kBlock) {
      HashLanes wide[kVectors];
      __builtin_memcpy(wide, lanes, sizeof lanes);
      for (; i + kBlock <= size; i += kBlock) {
#pragma GCC unroll 8
        for (size_t line = 0; line < kBlock; line += kLine) __builtin_prefetch(bytes + i + kAhead + line);
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v)
          wide[v] = hash_step(wide[v], *reinterpret_cast<const HashWords*>(bytes + i + v * sizeof(HashLanes)));
      }
      __builtin_memcpy(lanes, wide, sizeof lanes);
    }
    for (uint64_t* lane = lanes; i < size; i += kWord, ++lane) {
      uint64_t word = 0;
      __builtin_memcpy(&word, bytes + i, i + kWord <= size ? kWord : size - i);
      *lane = hash_step(*lane, word);
    }
    total = hash_step(total, size);  // so that moving numbers to the next range changes it
  }
  for (const uint64_t lane : lanes) {
    total = (total ^ lane) * 0xc4ceb9fe1a85ec53ull;
    total ^= total >> 29;
  }
  return total;
}

}  // namespace
