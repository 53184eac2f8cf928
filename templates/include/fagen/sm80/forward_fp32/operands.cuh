// Float32 operands of the tensor cores, which read the 11 leading bits of a number's 24.
#pragma once
#include <stdint.h>

#include "fagen/ptx/mma_tf32.cuh"

namespace fagen {

// A lane's kCount numbers of an operand. kSplit: each is the sum of two tf32 numbers, so that at most its last bit is
// lost; else it is rounded to one.
template <bool kSplit, int kCount>
struct Fragment {
  uint32_t high[kCount];
  uint32_t low[kSplit ? kCount : 1];

  __device__ __forceinline__ void set(int i, float x) {
    if constexpr (kSplit) {
      high[i] = (__float_as_uint(x) + 0x1000u) & ~0x1fffu;  // to nearest: half of a tf32's last bit, then cut
      low[i] = __float_as_uint(x - __uint_as_float(high[i]));
    } else {
      high[i] = ptx::round_to_tf32(x);
    }
  }
};

// sums += a b, of the leading parts alone.
template <bool kSplit>
__device__ __forceinline__ void multiply_high(float (&sums)[4], const Fragment<kSplit, 4>& a,
                                              const Fragment<kSplit, 2>& b) {
  ptx::mma_m16n8k8(sums, a.high, b.high);
}

// sums += what that leaves out of a b, but for the product of the two low parts: it is 2^-22 of the whole.
__device__ __forceinline__ void multiply_low(float (&sums)[4], const Fragment<true, 4>& a, const Fragment<true, 2>& b) {
  ptx::mma_m16n8k8(sums, a.low, b.high);
  ptx::mma_m16n8k8(sums, a.high, b.low);
}
__device__ __forceinline__ void multiply_low(float (&)[4], const Fragment<false, 4>&, const Fragment<false, 2>&) {}

}  // namespace fagen
