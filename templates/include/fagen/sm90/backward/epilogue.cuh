// Rounding: dQ when all keys have been to a row.
#pragma once
#include "fagen/sm90/backward/dq.cuh"

namespace fagen {

// dQ from float32 in the order of fragments to rows of elements, scaled: a chunk of 64 rows, the `index`-th of all
// heads. The work of a warpgroup.
template <class C, class Element>
__device__ __forceinline__ void round_rows(const fagen_backward_params& p, const BackwardLaunch& launch,
                                           int64_t index) {
  using Dq = DqShare<C>;
  const int chunks = launch.row_tiles * Dq::kRowChunks, chunk = index % chunks, plane = index / chunks;
  const int thread = threadIdx.x % 128, m = chunk * 64 + thread / 32 * 16 + thread % 32 / 4;
  const float* from =
      dq_sums<C>(launch, index / Dq::kRowChunks) + index % Dq::kRowChunks * (64 * C::kHeadDim) + thread * 4;
  const auto load = [&](int piece) {
    return __ldcg(reinterpret_cast<const float4*>(from + piece * (kPieceBytes / 4)));
  };
  store_rows<Element, (Dq::kChunkPieces + 3) / 4>(p.dq, plane / p.heads, plane % p.heads, m, p.seqlen_q, p.head_dim, 0,
                                                  Dq::kChunkPieces, gradient_scale<C>(p), load);
}
template <class C, class Element>
__device__ __forceinline__ void backward_epilogue(const fagen_backward_params& p, const BackwardLaunch& launch) {
  ptx::start_next_kernel();
  ptx::wait_for_previous_kernel();
  round_rows<C, Element>(p, launch, blockIdx.x);
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
  if (p.seqlen_k > 0)
    clear(p.dk, p.seqlen_k, p.kv_heads, p.head_dim), clear(p.dv, p.seqlen_k, p.kv_heads, p.head_dim_v);
}

}  // namespace fagen
