// The weights that dropout drops: random numbers by Philox4x32-7, for device and host alike. Plain C++.
//
// A weight's number depends on the seed, the offset, its head, row and key alone: never on tiles, warps or the kernel.
// One call of Philox gives 16 bytes, a byte a weight. They belong to rows 2 a, 2 a + 1, 2 a + 8, 2 a + 9 of a block of
// 16 rows, and to keys 2 b, 2 b + 1, 2 b + 8, 2 b + 9 of a block of 16 keys. Word 2 * (row % 2) + row / 8 has a row,
// and byte 2 * (key / 8) + key % 2 of it a key. Rows and keys are alike in that, and so are the threads of mma.sync and
// wgmma: whether the lines of a matrix are rows or keys, a lane and its neighbour of the next line share a call in each
// block. Each makes that of one of two blocks, and they exchange halves.
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

// The keys of the rounds, that follow from a 64-bit key.
constexpr int kRounds = 7;
struct RoundKeys {
  uint32_t key[kRounds][2];

  static FAGEN_SHARED RoundKeys of(uint64_t first) {
    RoundKeys keys;
    for (int round = 0; round < kRounds; ++round) {
      keys.key[round][0] = uint32_t(first) + round * 0x9E3779B9u;
      keys.key[round][1] = uint32_t(first >> 32) + round * 0xBB67AE85u;
    }
    return keys;
  }
};

struct WideProduct {
  uint32_t high, low;
};
FAGEN_SHARED WideProduct multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t product = uint64_t(a) * b;
  return {uint32_t(product >> 32), uint32_t(product)};
}
constexpr uint32_t kFactorA = 0xD2511F53u, kFactorB = 0xCD9E8D57u;  // of the first and the third counter

// Philox4x32-7 of a 64-bit key and a 128-bit counter. `from`: rounds that were done before.
FAGEN_SHARED RandomWords philox(const RoundKeys& keys, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                int from = 0) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = from; round < kRounds; ++round) {
    const WideProduct a = multiply_wide(kFactorA, c0), b = multiply_wide(kFactorB, c2);
    c0 = b.high ^ c1 ^ keys.key[round][0], c1 = b.low;
    c2 = a.high ^ c3 ^ keys.key[round][1], c3 = a.low;
  }
  return {{c0, c1, c2, c3}};
}

// The first rounds of a row alone, and of a key alone: a thread computes them once where its calls have a row, or a
// key, in common.
struct RowPart {
  uint32_t low[2];  // of products of the first two rounds
  WideProduct third;  // of the third round
};
struct KeyPart {
  WideProduct second;
};

// The dropout of one head: bytes below `kept` keep their weight; `scale` makes up for the dropped ones.
struct Dropout {
  RoundKeys keys;
  uint32_t offset, plane, kept;
  float scale;
  uint32_t lower_bits, sign_bits;  // of 256 - kept, in each byte
  uint32_t limits, above;  // two half floats 1024 + kept; four of the upper bytes of 1024 to 1279

  // The rate is rounded to 1/256; only 0 drops nothing, and only 1 all.
  static FAGEN_SHARED uint32_t kept_of(float rate) {
    const int nearest = int((1.f - rate) * 256.f + 0.5f);
    if (rate <= 0.f || rate >= 1.f) return rate <= 0.f ? 256 : 0;
    return nearest < 1 ? 1 : nearest > 255 ? 255 : nearest;
  }
  static FAGEN_SHARED float scale_of(uint32_t kept) { return kept ? 256.f / float(kept) : 0.f; }

  template <class Params>
  static FAGEN_SHARED Dropout of(const Params& p, int64_t batch, int64_t head) {
    const uint32_t kept = kept_of(p.dropout), least = 256 - kept;
    const uint32_t lower = kept ? (least & 127) * 0x01010101u : 0x80808080u, sign = (least & 384) ? 0x80808080u : 0;
    return {RoundKeys::of(p.rng[0]),
            uint32_t(p.rng[1]),
            uint32_t(batch * p.heads + head),
            kept,
            scale_of(kept),
            lower,
            sign,
            (0x6400 + kept) * 0x10001u,
            0x64646464u};
  }

  // The number that a call counts a row, or a key, by: 4 for each 16.
  static FAGEN_SHARED uint32_t counter(int line) { return uint32_t(line) / 16 * 4 + uint32_t(line) % 8 / 2; }
  FAGEN_SHARED RowPart of_row(uint32_t counter) const {
    const WideProduct a = multiply_wide(kFactorA, counter), of_plane = multiply_wide(kFactorB, plane);
    const WideProduct b = multiply_wide(kFactorB, a.high ^ offset ^ keys.key[0][1]);
    return {{a.low, b.low}, multiply_wide(kFactorA, b.high ^ of_plane.low ^ keys.key[1][0])};
  }
  FAGEN_SHARED KeyPart of_key(uint32_t counter) const {
    const WideProduct of_plane = multiply_wide(kFactorB, plane);
    return {multiply_wide(kFactorA, of_plane.high ^ counter ^ keys.key[0][0])};
  }
  // Philox of the counters of a row and a key, the plane and the offset.
  FAGEN_SHARED RandomWords words(const RowPart& row, const KeyPart& key) const {
    const WideProduct b = multiply_wide(kFactorB, key.second.high ^ row.low[0] ^ keys.key[1][1]);
    return philox(keys, b.high ^ row.low[1] ^ keys.key[2][0], b.low, row.third.high ^ key.second.low ^ keys.key[2][1],
                  row.third.low, 3);
  }
  // The call that has row `row` and key `key`.
  FAGEN_SHARED RandomWords words(int row, int key) const { return words(of_row(counter(row)), of_key(counter(key))); }
  // Whether a byte of a word keeps its weight.
  FAGEN_SHARED bool keeps(uint32_t word, int byte) const { return (word >> (8 * byte) & 255) < kept; }
  // The sign bit of a byte is set where it drops its weight: where 256 - kept, added to it, carries.
  FAGEN_SHARED uint32_t dropped(uint32_t word) const {
    const uint32_t sum = (word & 0x7f7f7f7fu) + lower_bits;
    return (word & sign_bits) | (word & sum) | (sign_bits & sum);
  }

  // Whether a weight is kept: the definition.
  FAGEN_SHARED bool keeps_weight(int row, int key) const {
    return keeps(words(row, key).word[row % 2 * 2 + row / 8 % 2], key / 8 % 2 * 2 + key % 2);
  }
};

}  // namespace fagen
