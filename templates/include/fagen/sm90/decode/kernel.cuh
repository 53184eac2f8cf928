// Decode on Hopper by the copy engine and wgmma: a block takes one split of the keys of one row tile.
//
//   warpgroups 0 .. kGroups - 1   consumers: 64 rows of q each                            consumer.cuh
//   the last one                  two warps load tiles of keys, two of values             producer.cuh
//
// Where several blocks share a row tile's keys a second kernel merges their parts. The host's part: launch.cuh.
#pragma once
#include "fagen/sm90/decode/consumer.cuh"
#include "fagen/sm90/decode/producer.cuh"

namespace fagen {

// The row tile of a block: `number` in the order of sequences, kv heads, rows. Packed rows have as many tiles as each
// sequence needs, so that a prompt among single tokens costs no blocks for theirs: warps count them. One that is not
// there has no rows.
template <class C>
__device__ __forceinline__ DecodeTile<C> tile_at(const fagen_decode_params& p, const DecodeGrid& grid, int number) {
  if (!p.cu_seqlens_q) return DecodeTile<C>(p, grid, number);
  const int lane = threadIdx.x % 32, group = p.heads / p.kv_heads;
  int before = 0;  // tiles of a kv head of the sequences that were counted
  for (int first = 0; first < p.batch; first += 32) {
    const int batch = first + lane;
    int tiles = 0;
    if (batch < p.batch) {
      const int row = max(p.cu_seqlens_q[batch], 0);
      const int tokens = min(min(p.cu_seqlens_q[batch + 1], p.rows) - row, p.seqlen_q);
      tiles = (max(tokens, 0) * group + C::kTileM - 1) / C::kTileM;
    }
    int upto = tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_sync(~0u, upto, max(lane - step, 0));
      if (lane >= step) upto += other;
    }
    const unsigned found = __ballot_sync(~0u, int64_t(number) < int64_t(before + upto) * p.kv_heads);
    if (found) {
      const int holder = __ffs(found) - 1, its = __shfl_sync(~0u, tiles, holder);
      const int within = number - (before + __shfl_sync(~0u, upto, holder) - its) * p.kv_heads;
      DecodeTile<C> tile(p, grid, ((first + holder) * p.kv_heads + within / its) * grid.row_tiles + within % its);
      tile.index = number;  // its parts lie where this block is in the grid
      return tile;
    }
    before += __shfl_sync(~0u, upto, 31);
  }
  DecodeTile<C> tile(p, grid, 0);
  tile.tokens = 0;
  return tile;
}

template <class C, class Element>
__device__ __forceinline__ DecodeOutput<C, Element> output_of(const fagen_decode_params& p, const DecodeTile<C>& tile,
                                                              const HeadScale& scale) {
  return {p, tile, ScoreMod<C>::softmax_scale_log2(score_params(scale.score, p.softcap)), scale.value};
}

template <class C, class Element>
__device__ __forceinline__ void run_block(const fagen_decode_params& p, const DecodeGrid& grid, const CUtensorMap& k,
                                          const CUtensorMap& v, unsigned char* memory) {
  using L = DecodeLayout<C>;
  const uint32_t smem = (ptx::shared_address(memory) + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  ptx::start_next_kernel();
  if (threadIdx.x == 0) {  // before lengths are waited for
    ptx::prefetch_map(&k);
    ptx::prefetch_map(&v);
    DecodeRings<C>(smem).init();
  }
  const int block = gridDim.x - 1 - blockIdx.x;  // of causal prompts the rows that see most keys first
  const int split_index = block % grid.splits;
  const DecodeTile<C> tile = tile_at<C>(p, grid, block / grid.splits);
  const DecodeSplit<C> split(tile, grid, split_index);
  if (tile.first_row >= tile.rows() || split_index >= split.used) return;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  __syncthreads();
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    load_keys(p, k, v, tile, split, smem, __shfl_sync(~0u, threadIdx.x / 32 % 4, 0));
    return;
  }
  ptx::more_registers<L::kConsumerRegisters>();
  const HeadScale scale(p, tile.batch, tile.kv_head);
  DecodeConsumer<C, Element> consumer(score_params(scale.score, p.softcap), tile, split, smem, group);
  load_rows<C, Element, L::kGroups * 128>(p, tile, smem, kRowsLoaded);
  consumer.visit_keys();
  consumer.finish(output_of<C, Element>(p, tile, scale), grid, split_index);
}

// A share of the merge of a row tile's splits.
template <class C, class Element>
__device__ __forceinline__ void run_merge(const fagen_decode_params& p, const DecodeGrid& grid) {
  const DecodeTile<C> tile = tile_at<C>(p, grid, blockIdx.x / merge_blocks<C>(p, grid.splits));
  const DecodeSplit<C> split(tile, grid, 0);
  const HeadScale scale(p, tile.batch, tile.kv_head);
  ptx::wait_for_previous_kernel();  // all do, or this kernel might end first; lengths were there before that one began
  if (tile.first_row >= tile.rows() || split.used == 1) return;
  merge_share(output_of<C, Element>(p, tile, scale), grid, split.used, blockIdx.x % merge_blocks<C>(p, grid.splits));
}

}  // namespace fagen
