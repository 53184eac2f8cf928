// The weights that dropout drops: random numbers by Philox4x32-10, for device and host alike. Plain C++.
//
// A weight's number depends on the seed, the offset, its head, row and key alone: never on tiles, warps or the kernel.
// One call of Philox gives 16 bytes, a byte a weight. They belong to rows r and r + 8 of a block of 16 rows, and to
// keys 8 j + 2 t and 8 j + 2 t + 1, j = 0 ... 3, of a block of 32 keys. So
//
//   - a thread of mma.sync or wgmma whose rows are rows of S needs all that a call gives: word j holds the four
//     accumulators of its piece j, in their order. There is one call a lane and block of 16 x 32.
//   - where keys are the rows of S, a warp has the same 32 calls made, one a lane, and lanes exchange words.
//
// ops/attention/dropout.py is the same in Python.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define FAGEN_SHARED __host__ __device__ __forceinline__
#else
#define FAGEN_SHARED inline
#endif

namespace fagen {

struct RandomWords {
  uint32_t word[4];
};

// Philox4x32-10 of a 64-bit key and a 128-bit counter.
FAGEN_SHARED RandomWords philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The dropout of one head: bytes below `kept` keep their weight; `scale` makes up for the dropped ones.
struct Dropout {
  uint64_t seed;
  uint32_t offset, plane, kept;
  float scale;

  // The rate is rounded to 1/256; only 0 drops nothing, and only 1 all.
  static FAGEN_SHARED uint32_t kept_of(float rate) {
    const int nearest = int((1.f - rate) * 256.f + 0.5f);
    if (rate <= 0.f || rate >= 1.f) return rate <= 0.f ? 256 : 0;
    return nearest < 1 ? 1 : nearest > 255 ? 255 : nearest;
  }
  static FAGEN_SHARED float scale_of(uint32_t kept) { return kept ? 256.f / float(kept) : 0.f; }

  template <class Params>
  static FAGEN_SHARED Dropout of(const Params& p, int64_t batch, int64_t head) {
    const uint32_t kept = kept_of(p.dropout);
    return {p.rng[0], uint32_t(p.rng[1]), uint32_t(batch * p.heads + head), kept, scale_of(kept)};
  }

  // The call that has row `row` and key `key`.
  FAGEN_SHARED RandomWords words(int row, int key) const {
    const uint32_t of_row = uint32_t(row) / 16 * 8 + uint32_t(row) % 8;
    const uint32_t of_key = uint32_t(key) / 32 * 4 + uint32_t(key) % 8 / 2;
    return philox(seed, of_row, of_key, plane, offset);
  }
  // Whether a byte of a word keeps its weight.
  FAGEN_SHARED bool keeps(uint32_t word, int byte) const { return (word >> (8 * byte) & 255) < kept; }

  // Whether a weight is kept: the definition.
  FAGEN_SHARED bool keeps_weight(int row, int key) const {
    return keeps(words(row, key).word[key / 8 % 4], row / 8 % 2 * 2 + key % 2);
  }
};

}  // namespace fagen
