// Rows whose keys were divided: parts of O, unnormalised, each with the reference and the sum of its softmax, merged.
#pragma once
#include "fagen/common/softmax.cuh"

namespace fagen {

// Four columns of a row of O, unnormalised, and the row's reference and sum.
struct RowSums {
  float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
  float reference, sum = 0.f;
};

// Merge parts of a row, always in the same order. `stats(i)` gives reference and sum of part i,
// `sums(i)` its columns; with `kOneSum` all parts have the same reference and their columns are in the first.
template <bool kOneSum, class Stats, class Sums>
__device__ __forceinline__ RowSums merge_parts(int count, float scale_log2, Stats stats, Sums sums) {
  RowSums row;
  row.reference = OnlineSoftmax<1, false>::kNoKeys;
#pragma unroll 8  // so many reads are under way at once
  for (int i = 0; i < count; ++i) row.reference = fmaxf(row.reference, stats(i).x);
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float2 part = stats(i);
    const float factor = ptx::ex2((part.x - row.reference) * scale_log2);
    row.sum += part.y * factor;
    if (kOneSum && i > 0) continue;
    const float4 x = sums(i);
    row.o.x += x.x * factor, row.o.y += x.y * factor, row.o.z += x.z * factor, row.o.w += x.w * factor;
  }
  return row;
}

}  // namespace fagen
