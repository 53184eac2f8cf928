// Rows are prepared before keys come to them: delta = sum over d of dO O, less dLSE; the LSE in base 2; and the
// counters of dQ set to zero, or dQ itself.
#pragma once
#include "fagen/sm90/backward/dq.cuh"

namespace fagen {

constexpr int kPrologueThreads = 256;
constexpr int kRowLanes = 8;  // share a row

// The sum of products of two words, two elements each.
template <class Element>
__device__ __forceinline__ float multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ float multiply_pairs<bfloat_t>(uint32_t a, uint32_t b) {
  return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
         __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
}
template <>
__device__ __forceinline__ float multiply_pairs<half_t>(uint32_t a, uint32_t b) {
  __half2 x, y;
  memcpy(&x, &a, 4), memcpy(&y, &b, 4);
  const float2 u = __half22float2(x), v = __half22float2(y);
  return u.x * v.x + u.y * v.y;
}

// The `index`-th row tile of all heads: a block's work.
template <class C, class Element>
__device__ __forceinline__ void prepare_rows(const fagen_backward_params& p, const BackwardLaunch& launch,
                                             int64_t index) {
  const int tile = index % launch.row_tiles, plane = index / launch.row_tiles;
  const int head = plane % p.heads, batch = plane / p.heads;
  constexpr int kThreads = kPrologueThreads;
  if (!BackwardLayout<C>::kRoundsDq && !launch.one_key_tile) {
    float4* zeroed = reinterpret_cast<float4*>(dq_sums<C>(launch, index));
    for (int i = threadIdx.x; i < DqShare<C>::kTileFloats / 4; i += kThreads)
      zeroed[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  } else {
    int first, last;  // a tile that no block has a part of is zero
    RowBand(p).key_tiles<C>(tile, first, last);
    if (last < first)
      for (int row = threadIdx.x / 32; row < C::kTileM && tile * C::kTileM + row < p.seqlen_q; row += kThreads / 32)
        for (int d = threadIdx.x % 32 * 8; d < p.head_dim; d += 256)
          *reinterpret_cast<uint4*>(static_cast<Element*>(p.dq.data) + batch * p.dq.stride[0] +
                                    (tile * C::kTileM + row) * p.dq.stride[1] + head * p.dq.stride[2] + d) =
              make_uint4(0, 0, 0, 0);
  }
  if ((C::kDeterministic || BackwardLayout<C>::kRoundsDq) && threadIdx.x < DqShare<C>::kGroups)
    launch.turns[index * DqShare<C>::kGroups + threadIdx.x] = 0;
  const int group = p.heads / p.kv_heads;
  if (kTurnsBySeen<C> && head % group == 0 && (p.mask_heads > 1 || head == 0))
    find_seen<C>(p, launch, batch, head / group, tile, kThreads / 32);
  const auto row_of = [&](const fagen_tensor& t, int m) {
    return static_cast<const Element*>(t.data) + batch * t.stride[0] + m * t.stride[1] + head * t.stride[2];
  };
#pragma unroll
  for (int row = threadIdx.x / kRowLanes; row < C::kTileM; row += kThreads / kRowLanes) {
    const int m = tile * C::kTileM + row;
    float sum = 0.f;
    if (m < p.seqlen_q) {
      const Element *out = row_of(p.o, m), *dout = row_of(p.dout, m);
      for (int d = threadIdx.x % kRowLanes * 8; d < p.head_dim_v; d += kRowLanes * 8) {
        const uint4 a = *reinterpret_cast<const uint4*>(out + d), b = *reinterpret_cast<const uint4*>(dout + d);
        sum += multiply_pairs<Element>(a.x, b.x) + multiply_pairs<Element>(a.y, b.y) +
               multiply_pairs<Element>(a.z, b.z) + multiply_pairs<Element>(a.w, b.w);
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kRowLanes; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (threadIdx.x % kRowLanes == 0) {
      const int64_t stat = int64_t(plane) * p.seqlen_q + m, at = index * C::kTileM + row;
      const float lse = m < p.seqlen_q ? p.lse[stat] : -INFINITY;
      const float subtracted = lse == -INFINITY ? INFINITY : lse;  // such a row's P is 0
      launch.lse[at] = subtracted * ScoreChange<C>::kLog2e;
      const float delta = lse != -INFINITY ? sum - (p.dlse ? p.dlse[stat] : 0.f) : 0.f;
      const float stored = C::kDropout ? delta * (Dropout::kept_of(p.dropout) / 256.f) : delta;
      launch.delta[at] = kSeedsDp<C> ? -stored : stored;
    }
  }
}

template <class C, class Element>
__device__ __forceinline__ void backward_prologue(const fagen_backward_params& p, const BackwardLaunch& launch) {
  ptx::wait_for_previous_kernel();
  ptx::start_next_kernel();  // which may read at once what was there before this one: k, v, dO
  prepare_rows<C, Element>(p, launch, blockIdx.x);
}

}  // namespace fagen
