// Which cells of the score matrix are visible: the band around the diagonal, and FlashMask's column intervals.
#pragma once
#include <limits.h>
#include <math.h>
#include <stdint.h>

#include "fagen/params.h"

constexpr int kFar = 1 << 29;  // beyond every index, and safe to add to one

// Row m sees keys [m + first, m + last] of the band, and no key at or past seqlen_k.
struct Band {
  int first, last, seqlen_k;

  __device__ __forceinline__ explicit Band(const fagen_params& p) : seqlen_k(p.seqlen_k) {
    const int shift = p.seqlen_k - p.seqlen_q;
    first = p.window_left < 0 ? -kFar : shift - p.window_left;
    last = p.window_right < 0 ? kFar : shift + p.window_right;
  }
  // the first key of row m, and one past its last
  __device__ __forceinline__ int begin(int m) const { return max(0, m + first); }
  __device__ __forceinline__ int end(int m) const { return max(0, min(seqlen_k, m + last + 1)); }
};

// The minima and maxima of the interval bounds over one tile of keys.
struct Extent {
  int low, high;
};

// Rows [ls, le) and [us, ue) do not see a key.
struct Hidden {
  int ls, le, us, ue;
  __device__ __forceinline__ bool hides(int m) const { return (m >= ls && m < le) || (m >= us && m < ue); }
};

// A head's interval vectors, and their extents tile by tile.
template <class Config>
struct Intervals {
  static constexpr int kColumns = Config::kIntervalColumns;
  const int32_t* bounds;   // (seqlen_k, kColumns), keys `stride` apart
  int64_t stride;
  const Extent* extents;   // (tiles, kColumns)
  int last_key;

  // A bound that the vectors do not carry is a constant, and its comparisons fold away.
  template <int kColumn>
  __device__ __forceinline__ Extent extent(int tile, int absent) const {
    if constexpr (kColumn < 0)
      return {absent, absent};
    else
      return extents[tile * kColumns + kColumn];
  }
  template <int kColumn>
  __device__ __forceinline__ int bound(int key, int absent) const {
    if constexpr (kColumn < 0)
      return absent;
    else
      return bounds[key * stride + kColumn];
  }
  __device__ __forceinline__ Hidden at(int key) const {
    return {bound<Config::kLTS>(key, kFar), bound<Config::kLTE>(key, kFar), bound<Config::kUTS>(key, -kFar),
            bound<Config::kUTE>(key, -kFar)};
  }

  // Rows [m0, m1) against a tile of keys: is no cell visible, and is any cell hidden?
  __device__ __forceinline__ void classify(int tile, int m0, int m1, bool& empty, bool& partial) const {
    const Extent ls = extent<Config::kLTS>(tile, kFar), le = extent<Config::kLTE>(tile, kFar);
    const Extent us = extent<Config::kUTS>(tile, -kFar), ue = extent<Config::kUTE>(tile, -kFar);
    empty = (m0 >= ls.high && m1 <= le.low) || (m0 >= us.high && m1 <= ue.low);
    partial = (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

// Minima and maxima per tile of keys: one warp a tile, one pass over the vectors. Body of a kernel of its own.
template <class Config>
__device__ __forceinline__ void find_extents(const fagen_params& p, Extent* extents, int tiles) {
  constexpr int kColumns = Config::kIntervalColumns;
  const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (index >= int64_t(p.batch) * p.mask_heads * tiles) return;
  const int tile = index % tiles, head = index / tiles % p.mask_heads, batch = index / tiles / p.mask_heads;
  const int32_t* bounds = p.intervals + batch * p.intervals_stride[0] + head * p.intervals_stride[1];
  const int end = min(p.seqlen_k, (tile + 1) * Config::kTileN);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    int low = INT_MAX, high = INT_MIN;
    for (int key = tile * Config::kTileN + lane; key < end; key += 32) {
      const int value = bounds[key * p.intervals_stride[2] + c];
      low = min(low, value);
      high = max(high, value);
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane == 0) extents[index * kColumns + c] = {low, high};
  }
}
