// Memory layout: the tiles, a thread's scratch, the parts of the workspace, how heads are cut into parts.
#pragma once
#include "fagen/abi/backward.h"
#include "fagen/cpu/backward/rows.h"
#include "fagen/cpu/mask.h"

namespace fagen {

template <class Config>
struct Layout {
  using Params = fagen_backward_params;
  using Rows = RowTile<Config::kHeadDim, Config::kHeadDimV, Config::kTileM>;
  static constexpr int kTileM = Config::kTileM, kTileN = Config::kTileN;
  static constexpr int kGroup = Config::kBlockVectors * kLanes;  // queries of a register block
  static constexpr int kWidth = Rows::kWidth, kStride = Rows::kStride, kStrideV = Rows::kStrideV;
  static constexpr bool kQOuter = Config::kLoopOrder == decltype(Config::kLoopOrder)::q_outer;
  static constexpr bool kPackTile = Config::kPacking == decltype(Config::kPacking)::tile;
  static constexpr bool kPackHead = Config::kPacking == decltype(Config::kPacking)::head;
  static constexpr bool kIntervals = Config::kIntervalColumns > 0;

  typedef float QueryGradient[Config::kHeadDim][kWidth];  // of a tile of rows, along lanes

  // S and then P, dP and then dS of a tile: queries along lanes.
  struct Cells {
    alignas(64) float weights[kTileN][kWidth];
    float gradients[kTileN][kWidth];
  };

  // A thread's own memory, on its stack. The gradients of the inner loop's side are in the workspace.
  struct Scratch {
    Cells cells;
    float keys[kPackTile ? kTileN : 1][kStride];
    float values[kPackTile ? kTileN : 1][kStrideV];
    alignas(64) char rows[kQOuter ? sizeof(Rows) : 1];
    alignas(64) float dq[kQOuter ? Config::kHeadDim : 1][kWidth];
    float dk[kQOuter ? 1 : kTileN][kStride];
    float dv[kQOuter ? 1 : kTileN][kStrideV];
  };

  // The outer loop of all heads of a kv head is cut into parts that threads share. Each sums into gradients of its own,
  // which are added in the order of the parts: the result does not depend on the threads.
  static int64_t outer_tiles(const Params& p) {
    return kQOuter ? p.heads / p.kv_heads * ceil_div(p.seqlen_q, kTileM) : ceil_div(p.seqlen_k, kTileN);
  }
  static int parts(const Params& p) {
    const int64_t wanted = ceil_div(Config::kParts, int64_t(p.batch) * p.kv_heads), tiles = outer_tiles(p);
    return wanted < tiles ? wanted : tiles;
  }

  // Offsets in bytes; a part that the config does not need is empty.
  struct Workspace {
    uint64_t bounds, keys, values, rows, dq, dk, dv, total = 0;

    explicit Workspace(const Params& p) {
      const uint64_t rows_k = uint64_t(p.batch) * p.kv_heads * p.seqlen_k, all_parts = parts(p);
      const uint64_t tiles_q = uint64_t(p.batch) * p.heads * ceil_div(p.seqlen_q, kTileM);
      bounds =
          take(kIntervals ? uint64_t(p.batch) * p.mask_heads * ceil_div(p.seqlen_k, kTileN) : 0, sizeof(HiddenBounds));
      keys = take(kPackHead ? rows_k : 0, kStride * sizeof(float));
      values = take(kPackHead ? rows_k : 0, kStrideV * sizeof(float));
      rows = take(kQOuter ? 0 : tiles_q, sizeof(Rows));
      dq = take(kQOuter ? 0 : tiles_q * all_parts, sizeof(QueryGradient));
      dk = take(kQOuter ? rows_k * all_parts : 0, kStride * sizeof(float));
      dv = take(kQOuter ? rows_k * all_parts : 0, kStrideV * sizeof(float));
    }

   private:
    uint64_t take(uint64_t count, uint64_t size) {
      const uint64_t begin = total;
      total += (count * size + 255) / 256 * 256;
      return begin;
    }
  };
};

}  // namespace fagen
