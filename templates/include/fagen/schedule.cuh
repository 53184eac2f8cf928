// Which tile of rows, head and batch a block takes.
#pragma once
#include <stdint.h>

#include "fagen/params.h"

struct Work {
  int row_tile, head, batch;
};

// `heads_at_once` (sectioned order): as many heads as have their keys and values in L2 together.
template <BlockOrder kOrder>
__device__ __forceinline__ Work take_work(const fagen_params& p, uint32_t index, int row_tiles, int heads_at_once) {
  const uint32_t heads = p.heads * p.batch;
  uint32_t row, head;
  if constexpr (kOrder == BlockOrder::ascending || kOrder == BlockOrder::descending) {
    row = index % row_tiles;
    head = index / row_tiles;
    if (kOrder == BlockOrder::descending) row = row_tiles - 1 - row;
  } else {  // longest rows of all heads first, section of heads by section
    const uint32_t section = kOrder == BlockOrder::sectioned ? heads_at_once : heads;
    const uint32_t whole = index / (section * row_tiles);
    const uint32_t here = min(section, heads - whole * section), rest = index - whole * section * row_tiles;
    head = whole * section + rest % here;
    row = row_tiles - 1 - rest / here;
  }
  return {int(row), int(head % p.heads), int(head / p.heads)};
}
