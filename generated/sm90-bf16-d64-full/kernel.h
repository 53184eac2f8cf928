// The interface of kernel.cu: attention forward for forward/bf16/d64/none
// on sm_90. Plain C. All kernels of fagen have this interface; to link two of them into one
// program, rename functions and namespace by the compiler: -Dfagen_launch=first_launch ... -Dfagen=first.
#pragma once
// ---- fagen/abi/forward.h ---------------------------------------------------------------------------------
// The arguments of a forward kernel: the one struct that a caller passes. Plain C; no torch, no CUDA header.
// ---- fagen/abi/tensor.h ----------------------------------------------------------------------------------
// A tensor that a kernel reads or writes, as every op passes it. Plain C; no torch, no CUDA header.
#include <stdint.h>

typedef struct fagen_tensor {
  void* data;         // null if the call has none
  int64_t stride[3];  // in elements; the op says of which dimensions. The last dimension is contiguous.
} fagen_tensor;

// Strides of q, k, v and o are those of batch, row and head. A batch stride of 0 broadcasts.
typedef struct fagen_forward_params {
  fagen_tensor q;             // (batch, seqlen_q, heads, head_dim)
  fagen_tensor k;             // (batch, seqlen_k, kv_heads, head_dim)
  fagen_tensor v;             // (batch, seqlen_k, kv_heads, head_dim_v)
  fagen_tensor o;             // (batch, seqlen_q, heads, head_dim_v), written
  fagen_tensor intervals;     // int32 (batch, mask_heads, seqlen_k, columns); strides: batch (or 0), mask head, key
  fagen_tensor alibi_slopes;  // float (batch, heads); strides: batch (or 0), the others unused
  float* lse;                 // (batch, heads, seqlen_q) contiguous, natural log; null if not wanted
  void* workspace;            // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int32_t batch, heads, kv_heads, mask_heads;
  int32_t seqlen_q, seqlen_k;
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around the bottom-right aligned diagonal; -1: unbounded
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
  float dropout;                      // probability that a weight is dropped; read by kernels with dropout
  const uint64_t* rng;                // seed and offset of the random numbers, where the kernel reads; null without
} fagen_forward_params;

// fagen_params_layout() of the kernel that this header belongs to.
#define FAGEN_PARAMS_LAYOUT "q.data 0 8; q.stride 8 24; k.data 32 8; k.stride 40 24; v.data 64 8; v.stride 72 24; o.data 96 8; o.stride 104 24; intervals.data 128 8; intervals.stride 136 24; alibi_slopes.data 160 8; alibi_slopes.stride 168 24; lse 192 8; workspace 200 8; batch 208 4; heads 212 4; kv_heads 216 4; mask_heads 220 4; seqlen_q 224 4; seqlen_k 228 4; head_dim 232 4; head_dim_v 236 4; window_left 240 4; window_right 244 4; scale 248 4; softcap 252 4; dropout 256 4; rng 264 8; sizeof 272"

#ifdef __cplusplus
extern "C" {
#endif
// Enqueues the kernel on `stream` (a cudaStream_t; ignored on the CPU). 0, or a code for fagen_error().
int fagen_launch(const fagen_forward_params* params, void* stream);
const char* fagen_error(int code);
// What params->workspace must hold; the other fields must be set, pointers aside.
uint64_t fagen_workspace_bytes(const fagen_forward_params* params);
// Name, offset and size of every field of the params as the kernel was built. Another text than FAGEN_PARAMS_LAYOUT:
// this header is of another kernel.
const char* fagen_params_layout(void);
#ifdef __cplusplus
}
#endif
