// Memory layout: the state of a row tile, a thread's scratch, the parts of the workspace.
#pragma once
#include "fagen/abi/forward.h"
#include "fagen/cpu/mask.h"
#include "fagen/cpu/softmax.h"

namespace fagen {

template <class Config>
struct Layout {
  static constexpr int kGroup = Config::kBlockVectors * kLanes;  // queries that advance together
  static constexpr int kGroups = Config::kTileM / kGroup;
  static constexpr bool kQOuter = Config::kLoopOrder == decltype(Config::kLoopOrder)::q_outer;
  static constexpr bool kPackTile = Config::kPacking == decltype(Config::kPacking)::tile;
  static constexpr bool kPackHead = Config::kPacking == decltype(Config::kPacking)::head;
  static constexpr bool kIntervals = Config::kIntervalColumns > 0;
  // packed rows are one cache line longer than the row, so that a column of v does not fall into few cache sets
  static constexpr int kStrideK = Config::kHeadDim + kMaxLanes, kStrideV = Config::kHeadDimV + kMaxLanes;

  using Group = GroupState<Config::kHeadDim, Config::kHeadDimV, kGroup>;

  // A thread's own memory, on its stack.
  struct Scratch {
    alignas(64) float scores[Config::kTileN * Config::kBlockVectors * kMaxLanes];
    float keys[kPackTile ? Config::kTileN : 1][kStrideK];
    float values[kPackTile ? Config::kTileN : 1][kStrideV];
    Group groups[kQOuter ? kGroups : 1];
  };

  // Offsets in bytes; a part that the config does not need is empty.
  struct Workspace {
    uint64_t bounds, keys, values, groups, total = 0;

    explicit Workspace(const fagen_forward_params& p) {
      const uint64_t rows_k = uint64_t(p.batch) * p.kv_heads * p.seqlen_k;
      const uint64_t tiles = uint64_t(p.batch) * p.mask_heads * ceil_div(p.seqlen_k, Config::kTileN);
      bounds = take(kIntervals ? tiles * sizeof(HiddenBounds) : 0);
      keys = take(kPackHead ? rows_k * kStrideK * sizeof(float) : 0);
      values = take(kPackHead ? rows_k * kStrideV * sizeof(float) : 0);
      groups = take(kQOuter ? 0 : uint64_t(p.batch) * p.heads * ceil_div(p.seqlen_q, kGroup) * sizeof(Group));
    }

   private:
    uint64_t take(uint64_t bytes) {
      const uint64_t begin = total;
      total += (bytes + 255) / 256 * 256;
      return begin;
    }
  };
};

}  // namespace fagen
