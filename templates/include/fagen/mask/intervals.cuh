// FlashMask's column intervals: each key is hidden from up to two intervals of rows.
#pragma once
#include <limits.h>
#include <stdint.h>

#include "fagen/mask/band.cuh"

namespace fagen {

// The minimum and maximum of an interval bound over one tile of keys.
struct Extent {
  int low, high;
};

// Rows [ls, le) and [us, ue) do not see a key.
struct HiddenRows {
  int ls, le, us, ue;
  __device__ __forceinline__ bool contains(int m) const { return (m >= ls && m < le) || (m >= us && m < ue); }
  // one of the two intervals covers all rows [m0, m1)
  __device__ __forceinline__ bool covers(int m0, int m1) const {
    return (m0 >= ls && m1 <= le) || (m0 >= us && m1 <= ue);
  }
  __device__ __forceinline__ bool equals(const HiddenRows& other) const {
    return ls == other.ls && le == other.le && us == other.us && ue == other.ue;
  }
};

// The interval vectors of a mask head.
__device__ __forceinline__ const int32_t* bounds_of(const fagen_forward_params& p, int batch, int head) {
  const fagen_tensor& t = p.intervals;
  return static_cast<const int32_t*>(t.data) + batch * t.stride[0] + head * t.stride[1];
}

// A head's interval vectors, and their extents tile by tile.
template <class C>
struct Intervals {
  static constexpr int kColumns = C::kIntervalColumns;
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
  __device__ __forceinline__ HiddenRows at(int key) const {
    return {bound<C::kLTS>(key, kFar), bound<C::kLTE>(key, kFar), bound<C::kUTS>(key, -kFar),
            bound<C::kUTE>(key, -kFar)};
  }

  // Rows [m0, m1) against a tile of keys: no element is visible, or some element is hidden.
  __device__ __forceinline__ void classify(int tile, int m0, int m1, bool& empty, bool& partial) const {
    const Extent ls = extent<C::kLTS>(tile, kFar), le = extent<C::kLTE>(tile, kFar);
    const Extent us = extent<C::kUTS>(tile, -kFar), ue = extent<C::kUTE>(tile, -kFar);
    empty = (m0 >= ls.high && m1 <= le.low) || (m0 >= us.high && m1 <= ue.low);
    partial = (m0 < le.high && m1 > ls.low) || (m0 < ue.high && m1 > us.low);
  }
};

// Extents of every tile of keys: one warp a tile, one pass over the vectors. The body of a kernel of its own.
template <class C>
__device__ __forceinline__ void find_extents(const fagen_forward_params& p, Extent* extents, int tiles) {
  constexpr int kColumns = C::kIntervalColumns;
  const int64_t index = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (index >= int64_t(p.batch) * p.mask_heads * tiles) return;
  const int tile = index % tiles, head = index / tiles % p.mask_heads, batch = index / tiles / p.mask_heads;
  const int32_t* bounds = bounds_of(p, batch, head);
  const int end = min(p.seqlen_k, (tile + 1) * C::kTileN);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    int low = INT_MAX, high = INT_MIN;
    for (int key = tile * C::kTileN + lane; key < end; key += 32) {
      const int value = bounds[key * p.intervals.stride[2] + c];
      low = min(low, value);
      high = max(high, value);
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane == 0) extents[index * kColumns + c] = {low, high};
  }
}

}  // namespace fagen
