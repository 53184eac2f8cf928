// The order in which row tiles are worked through: by batch, head and row, or the longest rows first.
#pragma once
#include <stdint.h>

#include "fagen/abi/forward.h"

namespace fagen {

struct TileCoord {
  int row_tile, head, batch;
};

// Division by a number that the host knows before a launch, as a product and a shift, of a number below 2^31.
struct Divisor {
  uint32_t by, shift, factor;

  Divisor() = default;
  explicit Divisor(uint32_t by) : by(by), shift(31) {
    while (1ull << (shift - 31) < by) ++shift;
    factor = uint32_t(((1ull << shift) + by - 1) / by);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return uint64_t(n) * factor >> shift; }
  __device__ __forceinline__ uint32_t remainder(uint32_t n, uint32_t quotient) const { return n - quotient * by; }
};

// The `index`-th tile of the order, by divisions, for kernels that find one tile a block. `heads_at_once` (sectioned
// order): as many heads as have their keys and values in L2 together.
template <BlockOrder kOrder>
__device__ __forceinline__ TileCoord tile_at(const fagen_forward_params& p, uint32_t index, int row_tiles,
                                             int heads_at_once) {
  const uint32_t heads = p.heads * p.batch;
  uint32_t row, head;
  if constexpr (kOrder == BlockOrder::ascending || kOrder == BlockOrder::descending) {
    row = index % row_tiles;
    head = index / row_tiles;
    if (kOrder == BlockOrder::descending) row = row_tiles - 1 - row;
  } else {  // longest rows of all heads first, section of heads by section
    const uint32_t section = kOrder == BlockOrder::sectioned ? heads_at_once : heads;
    const uint32_t number = index / (section * row_tiles);
    const uint32_t here = min(section, heads - number * section), rest = index - number * section * row_tiles;
    head = number * section + rest % here;
    row = row_tiles - 1 - rest / here;
  }
  return {int(row), int(head % p.heads), int(head / p.heads)};
}

// The same order for kernels whose blocks look for tile after tile: the host prepares the divisors, and the device
// divides nothing.
struct TileOrder {
  Divisor heads, row_tiles;       // heads per batch, row tiles per head
  Divisor section, last_section;  // heads per section, heads in the last one
  Divisor section_tiles;          // row tiles per section
  uint32_t last;                  // the first tile of the last section

  TileOrder() = default;
  template <BlockOrder kOrder>
  static TileOrder of(int row_tiles, int heads, int batch, int heads_at_once) {
    const uint32_t all = heads * batch, section = kOrder == BlockOrder::sectioned ? heads_at_once : all;
    const uint32_t before = (all - 1) / section * section;  // heads before the last section
    TileOrder order;
    order.heads = Divisor(heads), order.row_tiles = Divisor(row_tiles);
    order.section = Divisor(section), order.last_section = Divisor(all - before);
    order.section_tiles = Divisor(section * row_tiles), order.last = before * row_tiles;
    return order;
  }

  template <BlockOrder kOrder>
  __device__ __forceinline__ TileCoord tile_at(uint32_t index) const {
    uint32_t row, head;
    if constexpr (kOrder == BlockOrder::ascending || kOrder == BlockOrder::descending) {
      head = row_tiles.quotient(index), row = row_tiles.remainder(index, head);
      if (kOrder == BlockOrder::descending) row = row_tiles.by - 1 - row;
    } else {  // longest rows of all heads first, section of heads by section
      const uint32_t number = section_tiles.quotient(index), rest = section_tiles.remainder(index, number);
      const Divisor& here = index < last ? section : last_section;
      const uint32_t turn = here.quotient(rest);
      head = number * section.by + here.remainder(rest, turn);
      row = row_tiles.by - 1 - turn;
    }
    const uint32_t batch = heads.quotient(head);
    return {int(row), int(heads.remainder(head, batch)), int(batch)};
  }
};

}  // namespace fagen
