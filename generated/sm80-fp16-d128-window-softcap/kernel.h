// The interface of kernel.cu: attention forward for forward/fp16/d128/window/softcap
// on sm_90. Plain C. All kernels of fagen have this interface; to link two of them into one
// program, rename their functions on the compiler's command line: -Dfagen_launch=first_launch and so on.
// The arguments of a forward kernel: the one struct that a caller passes. Plain C; no torch, no CUDA header.
// Strides count elements, and the last dimension of q, k, v and o is contiguous.
#pragma once
#include <stdint.h>

typedef struct fagen_params {
  const void* q;               // (batch, seqlen_q, heads, head_dim) by strides
  const void* k;               // (batch, seqlen_k, kv_heads, head_dim)
  const void* v;               // (batch, seqlen_k, kv_heads, head_dim_v)
  void* o;                     // (batch, seqlen_q, heads, head_dim_v)
  float* lse;                  // (batch, heads, seqlen_q) contiguous, natural log; null if not wanted
  const int32_t* intervals;    // (batch, mask_heads, seqlen_k, columns), last dimension contiguous; or null
  const float* alibi_slopes;   // (batch, heads), last dimension contiguous; or null
  void* workspace;             // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int64_t q_stride[3];         // batch, row, head
  int64_t k_stride[3];
  int64_t v_stride[3];
  int64_t o_stride[3];
  int64_t intervals_stride[3]; // batch (0 to broadcast), mask head, key
  int64_t alibi_stride;        // batch (0 to broadcast)
  int32_t batch, heads, kv_heads, mask_heads;
  int32_t seqlen_q, seqlen_k;
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around the bottom-right aligned diagonal; -1: unbounded
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
} fagen_params;

#ifdef __cplusplus
extern "C" {
#endif
// Enqueues the kernel on `stream` (a cudaStream_t; ignored on the CPU). 0, or a code for fagen_error().
int fagen_launch(const fagen_params* params, void* stream);
const char* fagen_error(int code);
// What params->workspace must hold; the other fields must be set, pointers aside.
uint64_t fagen_workspace_bytes(const fagen_params* params);
// sizeof(fagen_params) as the kernel was built; differs when this header is of another kernel.
uint32_t fagen_params_size(void);
#ifdef __cplusplus
}
#endif
