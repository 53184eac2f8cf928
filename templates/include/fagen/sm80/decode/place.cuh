// Where a block stands: its sequence, rows and keys. All lengths are read here, on the device.
#pragma once
#include <stdint.h>

#include "fagen/abi/decode.h"
#include "fagen/mask/mask.cuh"

namespace fagen {

// The params that the shared headers read.
__device__ __forceinline__ fagen_forward_params score_params(float scale, float softcap) {
  fagen_forward_params p = {};
  p.scale = fmaxf(scale, 1e-37f);  // by 0 a hidden score would be no number
  p.softcap = softcap;
  return p;
}

// Computed once on the host for a launch, from the largest lengths alone.
struct DecodeGrid {
  int row_tiles;    // of a kv head
  int splits;       // blocks that share a row tile's keys
  int split_tiles;  // key tiles of a split, counted from key 0; 0: even shares of what a sequence has,
  int least_tiles;  // but no fewer than this
  bool clustered;   // blocks are clusters of neighbours in the grid: of splits of a tile, or of tiles of a sequence
  unsigned* arrived;  // (tile): splits that are done
  float2* stats;      // (tile, split, row): reference, sum
  float4* sums;       // (tile, split, row, dv / 4): O, unnormalised
};

// A row tile of one kv head of one sequence. Rows are (token, head of the group), tokens first.
template <class C>
struct DecodeTile {
  int index;  // among all row tiles
  int batch, kv_head;
  int first_row;  // packed, of the tile
  int first_q;    // row of q with the sequence's first token; with cu_seqlens_q in all of q, else in the sequence
  int tokens, keys, group;
  int begin, end;            // keys that some row sees
  int full_begin, full_end;  // keys that every row sees
  int window_left, window_right;

  __device__ __forceinline__ DecodeTile(const fagen_decode_params& p, const DecodeGrid& grid, int index)
      : index(index), first_q(0), tokens(p.seqlen_q), group(p.heads / p.kv_heads) {
    first_row = index % grid.row_tiles * C::kTileM;
    kv_head = index / grid.row_tiles % p.kv_heads;
    batch = index / grid.row_tiles / p.kv_heads;
    // no length leads out of the cache, of q or of the workspace
    keys = min(max(p.seqlens_k[batch], 0), p.seqlen_k);
    if (p.cu_seqlens_q) {
      first_q = max(p.cu_seqlens_q[batch], 0);
      tokens = min(min(p.cu_seqlens_q[batch + 1], p.rows) - first_q, p.seqlen_q);
    }
    window_left = MaskOf<C>::kHasBegin ? p.window_left : -1;
    window_right = MaskOf<C>::kHasEnd ? p.window_right : -1;
    const int first = token(first_row), last = token(first_row + C::kTileM - 1);
    begin = begin_of(first), full_begin = begin_of(last);
    full_end = end_of(first), end = end_of(last);
    if (first_row >= rows()) end = begin;
  }

  __device__ __forceinline__ int rows() const { return tokens * group; }
  // Rows that fill up the last tile count as its last token.
  __device__ __forceinline__ int token(int row) const { return max(0, min(row / group, tokens - 1)); }
  __device__ __forceinline__ int head(int row) const { return kv_head * group + row % group; }
  __device__ __forceinline__ int begin_of(int token) const {
    return MaskOf<C>::kHasBegin && window_left >= 0 ? min(keys, max(0, keys - tokens + token - window_left)) : 0;
  }
  __device__ __forceinline__ int end_of(int token) const {
    if (!MaskOf<C>::kHasEnd || window_right < 0) return keys;
    return int(max(int64_t(0), min(int64_t(keys), int64_t(keys) - tokens + token + window_right + 1)));
  }
};

// The key tiles of one split, counted from the cache's first key.
template <class C>
struct DecodeSplit {
  int used;  // splits that have keys, at least 1: a sequence without any has one that writes zeros
  int first, end;

  __device__ __forceinline__ DecodeSplit(const DecodeTile<C>& tile, const DecodeGrid& grid, int split) {
    const int from = tile.begin / C::kTileN, to = max(from, (tile.end + C::kTileN - 1) / C::kTileN);
    int share = grid.split_tiles, origin = 0;
    if (share) {
      origin = from / share * share;
    } else {
      share = max((to - from + grid.splits - 1) / grid.splits, grid.least_tiles);
      origin = from;
    }
    used = max(1, (to - origin + share - 1) / share);
    first = min(to, max(from, origin + split * share));
    end = min(to, origin + (split + 1) * share);
  }
};

}  // namespace fagen
