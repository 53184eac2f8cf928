// Decode of latent attention on Hopper: a block takes one split of the keys of one row tile.
//
//   warpgroups 0, 1   consumers: the scores of every other key tile each, half of the columns of O each    consumer.cuh
//   warpgroup 2       one warp loads key tiles, once: their first columns are the values                   producer.cuh
//
// Two blocks that share a row tile's keys merge their parts as a cluster (cluster_merge.cuh), several by a second
// kernel. The host's part: launch.cuh.
#pragma once
#include "fagen/sm90/mla/consumer.cuh"
#include "fagen/sm90/mla/producer.cuh"

namespace fagen {

template <class C>
__device__ __forceinline__ void init_parts(uint32_t smem) {
  for (int part = 0; part < 4; ++part) {
    const KeyPart<C> its{smem, part / 2, part % 2};
    for (int i = 0; i < its.slabs(); ++i) ptx::mbarrier_init(its.full(its.slab(i)), 1);
    ptx::mbarrier_init(its.empty(), 4);  // warps of the warpgroup that reads it last
  }
  ptx::fence_mbarrier_init();
}

template <class C, class Element>
__device__ __forceinline__ DecodeOutput<C, Element> output_of(const fagen_decode_params& p, const DecodeTile<C>& tile) {
  const HeadScale scale(p, tile.batch, tile.kv_head);
  return {p, tile, fmaxf(scale.score, 1e-37f) * DecodeOutput<C, Element>::kLog2e, scale.value};
}

template <class C, class Element, int kGroup>
__device__ __forceinline__ void consume(const fagen_decode_params& p, const DecodeGrid& grid, const DecodeTile<C>& tile,
                                        const DecodeSplit<C>& split, int split_index, uint32_t smem) {
  const DecodeOutput<C, Element> output = output_of<C, Element>(p, tile);
  MlaConsumer<C, Element, kGroup> consumer(tile, output.scale_log2, smem);
  load_rows<C, Element, MlaLayout<C>::kGroups * 128>(p, tile, smem, kRowsLoaded);
  consumer.keep_rotary_q();
  consumer.visit_keys(split);
  consumer.finish(output, grid, split_index, split.used == 1);
}

template <class C, class Element>
__device__ __forceinline__ void run_block(const fagen_decode_params& p, const DecodeGrid& grid, const CUtensorMap& map,
                                          unsigned char* memory) {
  using L = MlaLayout<C>;
  const uint32_t smem = (ptx::shared_address(memory) + kSmemAlignment - 1) & ~uint32_t(kSmemAlignment - 1);
  ptx::start_next_kernel();
  if (threadIdx.x == 0) {  // before lengths are waited for
    ptx::prefetch_map(&map);
    init_parts<C>(smem);
  }
  // neighbours are row tiles of a sequence, since they read the same keys, or the splits of a cluster
  const int neighbours = grid.clustered ? 1 : grid.row_tiles * p.kv_heads;
  const int all = blockIdx.x / neighbours, split_index = all % grid.splits;
  const DecodeTile<C> tile(p, grid, all / grid.splits * neighbours + blockIdx.x % neighbours);
  const DecodeSplit<C> split(tile, grid, split_index);
  const bool merges = merges_in_cluster(grid, split.used == 1);  // then blocks without keys come along
  if (tile.first_row >= tile.rows() || (!merges && split_index >= split.used)) return;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform for the compiler as well
  __syncthreads();
  if (group == L::kGroups) {
    ptx::fewer_registers<L::kProducerRegisters>();
    if (threadIdx.x / 32 % 4 == 0) load_keys(p, map, tile, split, smem);
    __syncwarp();
    if (merges) ptx::cluster_sync(), ptx::cluster_sync();  // as the consumers
  } else {
    ptx::more_registers<L::kConsumerRegisters>();
    if (group == 0)
      consume<C, Element, 0>(p, grid, tile, split, split_index, smem);
    else
      consume<C, Element, 1>(p, grid, tile, split, split_index, smem);
  }
}

// A share of the merge of a row tile's splits.
template <class C, class Element>
__device__ __forceinline__ void run_merge(const fagen_decode_params& p, const DecodeGrid& grid) {
  const DecodeTile<C> tile(p, grid, blockIdx.x / merge_blocks<C>(p, grid.splits));
  const DecodeSplit<C> split(tile, grid, 0);
  ptx::wait_for_previous_kernel();  // all do, or this kernel might end first; lengths were there before that one began
  if (tile.first_row >= tile.rows() || split.used == 1) return;
  merge_share(output_of<C, Element>(p, tile), grid, split.used, blockIdx.x % merge_blocks<C>(p, grid.splits));
}

}  // namespace fagen
