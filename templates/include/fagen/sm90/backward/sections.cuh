// One grid goes through sections of heads (dq_rounding=later_blocks). Its blocks prepare the rows of a section, work on
// its key tiles, and round its dQ. They start step by step; in step s are those that
//
//   prepare section s + 1  ─  work on the key tiles of section s  ─  round section s - 1
//
// A block waits only for what blocks before it do, so none waits for ever. Three sections at most have sums of dQ.
// Their places are used in turn and stay in L2. A kernel before prepares section 0.
#pragma once
#include <stdint.h>

#include "fagen/ptx/turn.cuh"
#include "fagen/schedule/tile_order.cuh"

namespace fagen {

enum class Task { none, prepare, keys, round };

// The task of a block, and which one of those with this task in its section it is.
struct Step {
  Task task;
  uint32_t section, index;
};

struct Sections {
  static constexpr uint32_t kPlaces = 3;  // sections that have sums of dQ at a time
  static constexpr int kHelperTiles = 8;  // row tiles that a block prepares or rounds

  uint32_t count;
  uint32_t key_tiles, row_tiles;  // of a section: blocks of key tiles, and row tiles; the last may have fewer
  uint32_t all_key_tiles, all_row_tiles;  // of all heads
  uint32_t helpers;  // blocks that prepare a section, and that round it
  Divisor step, places;  // blocks of a step; row tiles that have sums of dQ
  unsigned* counters;  // prepared, finished, rounded: blocks of each section that have

  Sections() = default;
  Sections(uint32_t count, uint32_t key_tiles, uint32_t row_tiles, uint32_t all_key_tiles, uint32_t all_row_tiles,
           uint32_t helpers)
      : count(count),
        key_tiles(key_tiles),
        row_tiles(row_tiles),
        all_key_tiles(all_key_tiles),
        all_row_tiles(all_row_tiles),
        helpers(helpers),
        step(key_tiles + 2 * helpers),
        places(kPlaces * row_tiles) {}

  uint32_t blocks() const { return (count + 1) * step.by; }
  uint32_t first_row_tiles() const { return row_tiles < all_row_tiles ? row_tiles : all_row_tiles; }
  uint32_t row_tiles_with_sums() const { return places.by < all_row_tiles ? places.by : all_row_tiles; }

  __device__ __forceinline__ unsigned* prepared(uint32_t section) const { return counters + section; }
  __device__ __forceinline__ unsigned* finished(uint32_t section) const { return counters + count + section; }
  __device__ __forceinline__ unsigned* rounded(uint32_t section) const { return counters + 2 * count + section; }
  __device__ __forceinline__ uint32_t key_tiles_of(uint32_t section) const {
    return min(key_tiles, all_key_tiles - section * key_tiles);
  }

  __device__ __forceinline__ Step step_at(uint32_t block) const {
    const uint32_t s = step.quotient(block), i = step.remainder(block, s);
    if (i < helpers) return {s + 1 < count ? Task::prepare : Task::none, s + 1, i};
    if (i >= helpers + key_tiles) return {s > 0 ? Task::round : Task::none, s - 1, i - helpers - key_tiles};
    return {s < count && i - helpers < key_tiles_of(s) ? Task::keys : Task::none, s, i - helpers};
  }
};

}  // namespace fagen
