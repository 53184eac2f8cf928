// In which order the tiles of rows are worked through. It is on the way to each next tile of rows, so that nothing is
// divided on it.
#pragma once
#include <stdint.h>

#include "fagen/schedule.cuh"

// Division by what is known before a launch, as a product and a shift, of a number below 2^31.
struct Divisor {
  uint32_t by, shift, factor;

  Divisor() = default;
  explicit Divisor(uint32_t by) : by(by), shift(31) {
    while (1ull << (shift - 31) < by) ++shift;
    factor = uint32_t(((1ull << shift) + by - 1) / by);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return uint64_t(n) * factor >> shift; }
  __device__ __forceinline__ uint32_t rest(uint32_t n, uint32_t quotient) const { return n - quotient * by; }
};

struct Order {
  Divisor heads, row_tiles;       // of a batch, of a head
  Divisor section, last_section;  // heads of a section, of the last one
  Divisor section_tiles;          // tiles of rows of a section
  uint32_t last;                  // the first one of the last section

  Order() = default;
  // `heads_at_once` (sectioned order): as many as have their keys and values in L2 together.
  template <BlockOrder kOrder>
  static Order of(int row_tiles, int heads, int batch, int heads_at_once) {
    const uint32_t all = heads * batch, section = kOrder == BlockOrder::sectioned ? heads_at_once : all;
    const uint32_t before = (all - 1) / section * section;  // the last section
    Order order;
    order.heads = Divisor(heads), order.row_tiles = Divisor(row_tiles);
    order.section = Divisor(section), order.last_section = Divisor(all - before);
    order.section_tiles = Divisor(section * row_tiles), order.last = before * row_tiles;
    return order;
  }

  template <BlockOrder kOrder>
  __device__ __forceinline__ Work take(uint32_t index) const {
    uint32_t row, head;
    if constexpr (kOrder == BlockOrder::ascending || kOrder == BlockOrder::descending) {
      head = row_tiles.quotient(index), row = row_tiles.rest(index, head);
      if (kOrder == BlockOrder::descending) row = row_tiles.by - 1 - row;
    } else {  // longest rows of all heads first, section of heads by section
      const uint32_t whole = section_tiles.quotient(index), rest = section_tiles.rest(index, whole);
      const Divisor& here = index < last ? section : last_section;
      const uint32_t turn = here.quotient(rest);
      head = whole * section.by + here.rest(rest, turn);
      row = row_tiles.by - 1 - turn;
    }
    const uint32_t batch = heads.quotient(head);
    return {int(row), int(heads.rest(head, batch)), int(batch)};
  }
};
