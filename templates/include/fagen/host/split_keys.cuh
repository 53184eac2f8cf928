// The host's part of forward kernels whose blocks share keys: how many parts, their workspace, the launch of both
// kernels.
#pragma once
#include "fagen/common/split_keys.cuh"
#include "fagen/host/launch.cuh"

namespace fagen {

constexpr int kMostParts = 128;

// The number of parts with the least cycles, by a model: the SM with the most blocks works through their key tiles,
// each block costs its start and, of several parts, a store of O in float32, which the merge reads again. Row tiles
// that fill the SMs are not split. `macs_a_cycle`: of an SM, as the kernel reaches them.
template <class C>
static int choose_parts(int row_tiles, int key_tiles, int sms, int macs_a_cycle) {
  constexpr int kStart = 1500, kMerge = 3000, kMostBlocks = 8;
  constexpr int kBytesPerCycle = 32;  // that an SM writes to L2 or reads from it
  constexpr int kPart = 2 * C::kTileM * C::kHeadDimV * 4 / kBytesPerCycle;
  const int visit = C::kTileM * C::kTileN * (C::kHeadDim + C::kHeadDimV) / macs_a_cycle + 200;
  const int most = key_tiles < kMostParts ? key_tiles : kMostParts;
  if (row_tiles >= sms) return 1;
  int best = 1;
  int64_t least = int64_t(key_tiles) * visit + kStart;
  for (int blocks = 1; blocks <= kMostBlocks; ++blocks) {  // on an SM
    const int fit = blocks * sms / row_tiles, parts = fit < most ? fit : most;
    const int64_t cycles = blocks * (int64_t(ceil_div(key_tiles, parts)) * visit + kStart + kPart) + kMerge;
    if (cycles < least) best = parts, least = cycles;
  }
  return best;
}

// The parts of a launch. Without a key that any row sees there is one, of no keys.
template <class C>
struct SplitPlan {
  int row_tiles;  // of all heads
  int parts = 1;

  SplitPlan(const fagen_forward_params& p, int row_tiles, int sms, int macs_a_cycle) : row_tiles(row_tiles) {
    const int first_key = p.window_left < 0 ? 0 : p.seqlen_k - p.seqlen_q - p.window_left;
    const KeyParts<C> whole(first_key > 0 ? first_key : 0, p.seqlen_k, 1);
    const int tiles = ceil_div(p.seqlen_k, C::kTileN) - whole.first_tile;
    if (row_tiles == 0 || tiles <= 0) return;
    parts = ceil_div(tiles, ceil_div(tiles, choose_parts<C>(row_tiles, tiles, sms, macs_a_cycle)));  // none is empty
  }
  uint64_t bytes() const { return parts > 1 ? StoredParts<C>::bytes(row_tiles, parts) : 0; }

  // Start a block for each row tile and part. With kEarly it may begin before the last kernel of the stream has ended.
  template <bool kEarly, class... Parameters, class... Arguments>
  cudaError_t launch(void (*kernel)(Parameters...), int threads, int smem, cudaStream_t stream,
                     const Arguments&... arguments) const {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    const dim3 grid(row_tiles, parts);
    const cudaLaunchConfig_t config = {grid, dim3(threads), size_t(smem), stream, &early, kEarly ? 1u : 0u};
    return cudaLaunchKernelEx(&config, kernel, arguments...);
  }
};

}  // namespace fagen
