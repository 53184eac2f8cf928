// With intervals: the row tiles of a key tile without those at either end that none of its keys is seen by.
//
// Of packed sequences a key tile sees a few row tiles out of all that the band leaves; to pass over the others one by
// one took as long as to compute these. Specialised here for the one Config, so that kernels without intervals keep
// their source.
#pragma once
#include "fagen/sm90/backward/walk.cuh"

namespace fagen {

struct BandConfig : Config {};  // the same key tile, by the band alone

template <>
__device__ __forceinline__ KeyTile<Config>::KeyTile(const BackwardLaunch& launch, const RowBand& band, uint32_t smem,
                                                    uint32_t index) {
  const KeyTile<BandConfig> by_band(launch, band, smem, index);
  tile = by_band.tile, kv_head = by_band.kv_head, split = by_band.split, batch = by_band.batch, n0 = by_band.n0;
  begin = by_band.begin, end = by_band.end, full_begin = by_band.full_begin, full_end = by_band.full_end;
  splits = by_band.splits, extents = by_band.extents;
  // where parts of dQ take turns, all key tiles that the band shows have one
  if constexpr (!Config::kDeterministic && !BackwardLayout<Config>::kRoundsDq) {
    const uint4 lower = ptx::ld_shared_16(extents), upper = ptx::ld_shared_16(extents + 16);
    const int ls_high = lower.y, le_low = lower.z, us_high = upper.y, ue_low = upper.z;
    if (le_low >= end * Config::kTileM || le_low >= band.seqlen_q)
      end = min(end, (max(ls_high, 0) + Config::kTileM - 1) / Config::kTileM);
    if (us_high <= begin * Config::kTileM) begin = max(begin, min(ue_low, band.seqlen_q) / Config::kTileM);
    end = max(begin, end);
  }
}

}  // namespace fagen
