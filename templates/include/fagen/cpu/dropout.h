// Dropout of a tile of weights: which cells are kept, a byte each, in the order of the weights.
#pragma once
#include "fagen/common/philox.h"
#include "fagen/cpu/mask.h"
#include "fagen/cpu/simd.h"

namespace fagen {

// Queries along lanes, as the weights lie.
template <int kKeys, int kRows>
struct KeptWeights {
  static constexpr int kBlockRows = 16, kBlockKeys = 32;  // of the cells that 32 calls of Philox decide

  alignas(64) uint8_t cells[kKeys][kRows];  // 1: kept

  // Decide for some rows and keys; the first row and key are those of cells[0][0].
  void fill(const Dropout& dropout, Range rows, Range keys) {
    const auto floor = [](int at, int size) { return at / size * size; };
    for (int key = floor(keys.begin, kBlockKeys); key < keys.end; key += kBlockKeys)
      for (int row = floor(rows.begin, kBlockRows); row < rows.end; row += kBlockRows)
        fill_block(dropout, row, key, rows, keys);
  }

  FAGEN_INLINE ivec at(int key, int row) const {
    typedef uint8_t bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const bytes*>(&cells[key][row]), ivec) != 0;
  }

  // The weights of these keys become 0 where they are dropped.
  template <int kVectors>
  void drop(float* weights, int keys) const {
    for (int key = 0; key < keys; ++key)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        float* const x = weights + key * kRows + v * kLanes;
        store(x, at(key, v * kLanes) ? load(x) : vec{});
      }
  }

 private:
  void fill_block(const Dropout& dropout, int row, int key, Range rows, Range keys) {
    uint32_t words[4][2][kBlockRows];  // of a pair of keys and a block of 16 of them: the rows' words side by side
    for (int pair = 0; pair < 4; ++pair)
#pragma GCC ivdep
      for (int call = 0; call < 8; ++call) {
        const int block = call / 4, line = call % 4 * 2;
        const RandomWords drawn = dropout.words(row + line, key + block * 16 + pair * 2);
        for (int word = 0; word < 4; ++word) words[pair][block][word % 2 * 8 + line + word / 2] = drawn.word[word];
      }
    const Range some = intersect({key, key + kBlockKeys}, keys), lines = intersect({row, row + kBlockRows}, rows);
    for (int n = some.begin; n < some.end; ++n) {
      const uint32_t* const from = words[n % 8 / 2][n / 16 % 2];
      uint8_t* const to = cells[n - keys.begin] - rows.begin;
      for (int m = lines.begin; m < lines.end; ++m) to[m] = dropout.keeps(from[m % 16], n / 8 % 2 * 2 + n % 2);
    }
  }
};

}  // namespace fagen
