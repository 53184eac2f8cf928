// After the main kernel: dQ, dK and dV from the sums of many blocks; or dQ from blocks of its own.
#pragma once
#include "fagen/sm80/backward/key_block.cuh"
#include "fagen/sm80/backward/row_block.cuh"

namespace fagen {

// dQ of a tile of rows from the sums of all tiles of keys.
template <class C, class Element>
__device__ __forceinline__ void store_dq_sums(const fagen_backward_params& p, const GradientArgs& args,
                                              unsigned char* shared) {
  using S = KeyBlockShape<C>;
  using DqSums = typename KeyBlock<C, Element>::DqSums;
  const KeyBlockShare<C> share;
  const int tile = blockIdx.x % args.row_tiles, head = blockIdx.x / args.row_tiles;
  typename DqSums::Sums dq;
  DqSums::load(args.dq_sum + int64_t(blockIdx.x) * DqSums::kFloats, dq);
  const auto to = matrix<Element>(p.dq, head / p.heads, head % p.heads, p.seqlen_q, p.head_dim);
  store_part<typename S::TileQ, C::kAligned>(Lane(), ptx::shared_address(shared), share.dq_row,
                                             share.dq_part * S::kDqColumns, dq, p.scale, to, tile * C::kTileM);
}

template <class C, class Element>
__device__ __forceinline__ void run_dq(const fagen_backward_params& p, const GradientArgs& args,
                                       unsigned char* shared) {
  if constexpr (KeyBlockShape<C>::kAddsDq) {
    store_dq_sums<C, Element>(p, args, shared);
  } else {
    RowBlock<C, Element> block(p, args, shared);
    run_row_block(block);
  }
}

// dK and dV of a tile of keys from the sums of all heads of a group.
template <class C, class Element>
__device__ __forceinline__ void run_dkv(const fagen_backward_params& p, const GradientArgs& args,
                                        unsigned char* shared) {
  if constexpr (C::kGqa == Gqa::atomics) {
    using Block = KeyBlock<C, Element>;
    const int tile = blockIdx.x % args.key_tiles, head = blockIdx.x / args.key_tiles;
    typename Block::DkSums::Sums dk;
    typename Block::DvSums::Sums dv;
    Block::DkSums::load(args.dk_sum + int64_t(blockIdx.x) * Block::DkSums::kFloats, dk);
    Block::DvSums::load(args.dv_sum + int64_t(blockIdx.x) * Block::DvSums::kFloats, dv);
    store_keys<C, Element>(p, Lane(), KeyBlockShare<C>(), ptx::shared_address(shared), head / p.kv_heads,
                           head % p.kv_heads, tile * C::kTileN, dk, dv);
  }
}

}  // namespace fagen
