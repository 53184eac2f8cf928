// The kernel after the backward one: dQ from float32 in the order of fragments to rows of elements, scaled. A warpgroup
// has a chunk of 64 rows.
#pragma once
#include "fagen/common/element.cuh"
#include "fagen/sm90/backward/dq.cuh"

namespace fagen {

template <class C, class Element>
__device__ __forceinline__ void backward_epilogue(const fagen_backward_params& p, const BackwardLaunch& launch) {
  using Dq = DqShare<C>;
  const int chunks = launch.row_tiles * Dq::kRowChunks, chunk = blockIdx.x % chunks, plane = blockIdx.x / chunks;
  const int head = plane % p.heads, batch = plane / p.heads, thread = threadIdx.x;
  const bool odd = thread % 2;
  const int column = odd * 8 + thread % 4 / 2 * 4;  // in two pieces
  const int first = chunk * 64 + thread / 32 * 16 + thread % 32 / 4;
  Element* out = static_cast<Element*>(p.dq.data) + batch * p.dq.stride[0] + head * p.dq.stride[2] + column;
  const float* from = launch.dq + int64_t(blockIdx.x) * (64 * C::kHeadDim) + thread * 4;
  ptx::start_next_kernel();
  ptx::wait_for_previous_kernel();
#pragma unroll
  for (int n = 0; n < Dq::kChunkPieces; n += 2) {
    const float4 a = *reinterpret_cast<const float4*>(from + n * (kPieceBytes / 4));
    const float4 b = *reinterpret_cast<const float4*>(from + (n + 1) * (kPieceBytes / 4));
    const float c[2][4] = {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t mine[2] = {pack<Element>(c[0][r * 2] * p.scale, c[0][r * 2 + 1] * p.scale),
                                pack<Element>(c[1][r * 2] * p.scale, c[1][r * 2 + 1] * p.scale)};
      const uint32_t other = __shfl_xor_sync(~0u, odd ? mine[0] : mine[1], 1);
      const int m = first + r * 8;
      if (m < p.seqlen_q && n * 8 < p.head_dim - column)
        *reinterpret_cast<uint2*>(out + m * p.dq.stride[1] + n * 8) =
            odd ? make_uint2(other, mine[1]) : make_uint2(mine[0], other);
    }
  }
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
