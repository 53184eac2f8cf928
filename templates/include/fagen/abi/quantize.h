// The arguments of the kernels that make fp8 numbers (e4m3) of q, k and v. Plain C; no torch, no CUDA header.
#pragma once
#include "fagen/abi/tensor.h"

// Strides are those of batch, row and head. Rows begin at multiples of 16 bytes; head dims are multiples of 16. With
// signs, q and k are multiplied by them and by an orthonormal Hadamard matrix along each part of a row, which is as
// long as the largest power of two that divides head_dim. Numbers are divided by their scale, that of a batch and kv
// head; descales are those scales. With block, each so many rows of a head of q, and of k, have one instead, and
// (batch, kv_heads) becomes (batch, heads, blocks of seqlen_q) for q, (batch, kv_heads, blocks of seqlen_k) for k.
typedef struct fagen_quantize_params {
  fagen_tensor q;      // (batch, seqlen_q, heads, head_dim)
  fagen_tensor k;      // (batch, seqlen_k, kv_heads, head_dim)
  fagen_tensor v;      // (batch, seqlen_k, kv_heads, head_dim_v)
  fagen_tensor q_fp8;  // like q, e4m3; written
  fagen_tensor k_fp8;  // like k
  void* v_fp8;         // (batch, kv_heads, blocks of 32 keys, head_dim_v, 32) contiguous, e4m3; written
  const float* signs;  // (head_dim): 1 or -1; null: q and k stay as they are
  uint32_t* largest;   // (batch, kv_heads) of q, of k, of v, one behind the other: zeros; written: the bits of the
                       // largest numbers
  float* descales;     // the same, the scales; written
  int32_t batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;
  int32_t element;  // the dtype of q, k and v: 0 float32, 1 fp16, 2 bf16
  int32_t block;    // rows of q, and of k, that have a scale of their own; 0: none
  const float* cos;     // (positions, half) contiguous, of a rotary embedding of q and k; null: there is none
  const float* sin;     // row j of k has position j, row i of q i + seqlen_k - seqlen_q, which is not negative
  int32_t half;         // pairs of columns that are turned; a multiple of 16 unless interleaved
  int32_t interleaved;  // pairs of neighbours, else of columns `half` apart
} fagen_quantize_params;
