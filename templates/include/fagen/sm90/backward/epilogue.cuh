// The kernel after the backward one, where its blocks do not round dQ themselves: from float32 in the order of fragments
// to rows of elements, scaled. A warpgroup has a chunk of 64 rows.
#pragma once
#include "fagen/sm90/backward/dq.cuh"

namespace fagen {

template <class C, class Element>
__device__ __forceinline__ void backward_epilogue(const fagen_backward_params& p, const BackwardLaunch& launch) {
  using Dq = DqShare<C>;
  const int chunks = launch.row_tiles * Dq::kRowChunks, chunk = blockIdx.x % chunks, plane = blockIdx.x / chunks;
  const int thread = threadIdx.x, m = chunk * 64 + thread / 32 * 16 + thread % 32 / 4;
  const float* from = launch.dq + int64_t(blockIdx.x) * (64 * C::kHeadDim) + thread * 4;
  ptx::start_next_kernel();
  ptx::wait_for_previous_kernel();
  store_dq<C, Element, Dq::kChunkPieces / 2>(p, plane / p.heads, plane % p.heads, m, 0, Dq::kChunkPieces, [&](int piece) {
    return *reinterpret_cast<const float4*>(from + piece * (kPieceBytes / 4));
  });
}

// All gradients are zero: there are no rows or no keys. A grid's work, a warp a row.
template <class Element>
__device__ __forceinline__ void store_zero_gradients(const fagen_backward_params& p) {
  ptx::wait_for_previous_kernel();
  const auto clear = [&](const fagen_tensor& t, int64_t length, int64_t heads, int columns) {
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < p.batch * heads * length;
         i += gridDim.x * blockDim.x / 32) {
      Element* row = static_cast<Element*>(t.data) + i / length / heads * t.stride[0] + i % length * t.stride[1] +
                     i / length % heads * t.stride[2];
      for (int column = threadIdx.x % 32 * 8; column < columns; column += 256)
        *reinterpret_cast<uint4*>(row + column) = make_uint4(0, 0, 0, 0);
    }
  };
  if (p.seqlen_q > 0) clear(p.dq, p.seqlen_q, p.heads, p.head_dim);
  if (p.seqlen_k > 0) clear(p.dk, p.seqlen_k, p.kv_heads, p.head_dim), clear(p.dv, p.seqlen_k, p.kv_heads, p.head_dim_v);
}

}  // namespace fagen
