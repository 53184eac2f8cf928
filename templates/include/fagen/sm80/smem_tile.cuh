// The layout of a tile in shared memory: eight rows of one 16-byte column fall into different banks.
#pragma once
#include <stdint.h>

namespace fagen {

// kSwizzled: the 16-byte pieces of a row are exchanged by bits of the row number; else each row is 16 bytes longer.
template <int kRows, int kCols, bool kSwizzled>
struct SmemTile {
  static constexpr int kChunks = kCols / 8;  // 16-byte pieces of a row
  static constexpr int kPitch = kCols * 2 + (kSwizzled ? 0 : 16);
  static constexpr int kBytes = kRows * kPitch;

  // as many exchanged bits as the row's length leaves free: 3 for multiples of 64 columns, 2 for 32, 1 for 16
  static constexpr int kBits = !kSwizzled ? 0 : kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : 1;
  static constexpr uint32_t kExchanged = ((1u << kBits) - 1u) << 4;
  static_assert(kCols % 16 == 0, "rows are whole 32-byte pieces");

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    const int exchange = kSwizzled ? (row >> (3 - kBits)) & ((1 << kBits) - 1) : 0;
    return row * kPitch + ((chunk ^ exchange) << 4);
  }

  // From the address of (row, chunk 0 or 1) to (row + down, chunk + 2 * right); `down` is a multiple of 8.
  static __device__ __forceinline__ uint32_t step(uint32_t address, int down, int right) {
    const uint32_t across = right * 32;
    return (address ^ (across & kExchanged)) + (across & ~kExchanged) + down * kPitch;
  }
};

}  // namespace fagen
