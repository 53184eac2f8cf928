// Tensor-core products of one warp (sm_80 and up): m16n8k8, tf32 operands, float32 sums.
#pragma once
#include <stdint.h>

namespace fagen::ptx {

// c += a b. Lane l holds of a: rows l/4 and l/4+8, columns l%4 and l%4+4, as (r,c) (r+8,c) (r,c+4) (r+8,c+4); of b:
// column l/4, rows l%4 and l%4+4; of c: as mma_m16n8k16. The last 13 bits of an operand are not read.
__device__ __forceinline__ void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest tf32 number.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

}  // namespace fagen::ptx
