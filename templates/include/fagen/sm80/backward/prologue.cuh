// Before the main kernel: the stats of every row, and zeros where blocks will add.
#pragma once
#include "fagen/sm80/backward/block.cuh"

namespace fagen {

constexpr int kPrologueThreads = 256;
constexpr int kLanesPerRow = 8;
constexpr int kPrologueRows = kPrologueThreads / kLanesPerRow;  // rows of a block

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<bfloat_t>(uint32_t pair) {
  __nv_bfloat162 both;
  memcpy(&both, &pair, 4);
  return __bfloat1622float2(both);
}

template <>
__device__ __forceinline__ float2 unpack<half_t>(uint32_t pair) {
  __half2 both;
  memcpy(&both, &pair, 4);
  return __half22float2(both);
}

// Eight neighbouring elements of a row as numbers; those past `count` are 0.
template <bool kAligned, class Element>
__device__ __forceinline__ void load_chunk(float (&x)[8], const Element* from, int count) {
  uint4 chunk;
  if constexpr (kAligned)
    chunk = *reinterpret_cast<const uint4*>(from);
  else
    chunk = gather_chunk(from, count);
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = unpack<Element>(pairs[i]);
    x[2 * i] = both.x, x[2 * i + 1] = both.y;
  }
}

// A row's sum of dO * O, eight lanes together.
template <class C, class Element>
__device__ __forceinline__ float dot(const GlobalMatrix<Element>& o, const GlobalMatrix<Element>& dout, int row,
                                     int lane) {
  float sum = 0.f;
#pragma unroll
  for (int first = 0; first < C::kHeadDimV; first += kLanesPerRow * 8) {
    const int column = first + lane * 8;
    if (row >= o.rows || column >= o.cols) continue;
    float x[8], y[8];
    load_chunk<C::kAligned>(x, o.base + row * o.stride + column, o.cols - column);
    load_chunk<C::kAligned>(y, dout.base + row * dout.stride + column, o.cols - column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
  }
#pragma unroll
  for (int step = kLanesPerRow / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Rows count those that fill up the last tile of each head.
template <class C, class Element>
__device__ __forceinline__ void run_prologue(const fagen_backward_params& p, const GradientArgs& args) {
  for (int64_t i = int64_t(blockIdx.x) * kPrologueThreads + threadIdx.x; i < args.zero_count;
       i += int64_t(gridDim.x) * kPrologueThreads)
    args.zeros[i] = make_float4(0.f, 0.f, 0.f, 0.f);

  const int lane = threadIdx.x % kLanesPerRow;
  const int64_t index = int64_t(blockIdx.x) * kPrologueRows + threadIdx.x / kLanesPerRow;
  const int64_t all = int64_t(p.batch) * p.heads * args.stats_rows;
  const int64_t head = (index < all ? index : all - 1) / args.stats_rows;  // every lane takes part in the sum
  const int row = index < all ? int(index - head * args.stats_rows) : p.seqlen_q;
  const int b = int(head / p.heads), h = int(head % p.heads);
  const auto o = matrix<Element>(p.o, b, h, p.seqlen_q, p.head_dim_v);
  const auto dout = matrix<Element>(p.dout, b, h, p.seqlen_q, p.head_dim_v);
  RowStats stats = {INFINITY, dot<C>(o, dout, row, lane)};
  if (index >= all || lane != 0) return;
  if (row < p.seqlen_q) {
    const int64_t at = head * p.seqlen_q + row;
    if (p.dlse) stats.delta -= p.dlse[at];
    if (p.lse[at] == -INFINITY)
      stats.delta = 0.f;  // nothing that was computed from this row depends on anything
    else
      stats.lse_log2 = p.lse[at] * ScoreGradient<C>::kLog2e;
  }
  args.stats[index] = stats;
}

}  // namespace fagen
