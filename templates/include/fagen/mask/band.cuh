// The band around the diagonal (causal and window masks, the end of the keys), and the key tiles that rows see of it.
#pragma once
#include <stdint.h>

#include "fagen/abi/forward.h"

namespace fagen {

constexpr int kFar = 1 << 29;  // beyond every index, and safe to add to one

// Row m sees keys [m + first, m + last] of the band, and no key at or past seqlen_k.
struct Band {
  int first, last, seqlen_k;

  __device__ __forceinline__ explicit Band(const fagen_forward_params& p) : seqlen_k(p.seqlen_k) {
    const int shift = p.seqlen_k - p.seqlen_q;
    first = p.window_left < 0 ? -kFar : shift - p.window_left;
    last = p.window_right < 0 ? kFar : shift + p.window_right;
  }
  // the first key of row m, and one past its last
  __device__ __forceinline__ int begin(int m) const { return max(0, m + first); }
  __device__ __forceinline__ int end(int m) const { return max(0, min(seqlen_k, m + last + 1)); }

  // The keys that row m sees, relative to a column of the tile that begins at a key.
  struct Columns {
    int begin, end;
  };
  __device__ __forceinline__ Columns visible_columns(int m, int key, int column) const {
    return {begin(m) - key - column, end(m) - key - column};
  }
};

// Tiles [begin, end) hold every visible element of rows [m0, m1); those of [full_begin, full_end) hold no hidden one.
// Tiles are visited from the last to the first.
struct TileRange {
  int begin, end, full_begin, full_end;

  template <int kTileN>
  static __device__ __forceinline__ TileRange of(const Band& band, int m0, int m1) {
    TileRange r;
    const int keys_end = band.end(m1 - 1);
    r.end = (keys_end + kTileN - 1) / kTileN;
    r.begin = min(band.begin(m0) / kTileN, r.end);
    r.full_end = max(r.begin, min(band.end(m0), band.seqlen_k) / kTileN);
    r.full_begin = min(r.full_end, max(r.begin, (band.begin(m1 - 1) + kTileN - 1) / kTileN));
    return r;
  }
};

}  // namespace fagen
