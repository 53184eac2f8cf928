// The interface of kernel.cu: attention decode for decode/bf16/d576-512/none/page64/shared-kv
// on sm_90. Plain C. All kernels of fagen have this interface; to link two of them into one
// program, rename functions and namespace by the compiler: -Dfagen_launch=first_launch ... -Dfagen=first.
#pragma once
// ---- fagen/abi/decode.h ----------------------------------------------------------------------------------
// The arguments of a decode kernel: few query rows a sequence on a cache of keys. Plain C; no torch, no CUDA header.
// ---- fagen/abi/tensor.h ----------------------------------------------------------------------------------
// A tensor that a kernel reads or writes, as every op passes it. Plain C; no torch, no CUDA header.
#include <stdint.h>

typedef struct fagen_tensor {
  void* data;         // null if the call has none
  int64_t stride[3];  // in elements; the op says of which dimensions. The last dimension is contiguous.
} fagen_tensor;

// Row i of a sequence with n rows and m keys stands at key m - n + i. Lengths are read where the kernel runs; those on
// the host are upper bounds. What lies in the cache behind a sequence's keys, and entries of the page table behind its
// pages, may hold anything: NaN, and no page at all. With cu_seqlens_q the rows of all sequences lie one behind the
// other: q is (rows, heads, head_dim), its batch stride unused, o is like it, the LSE (heads, rows).
//
// The LSE of a row that sees nothing is its sink, or -inf. num_splits = -n: n keys a block, counted from key 0,
// whatever the sizes are, so that a sequence's result does not depend on the others.
typedef struct fagen_decode_params {
  fagen_tensor q;           // (batch, seqlen_q, heads, head_dim); strides: batch, row, head
  fagen_tensor k;           // cache (pages, page_size, kv_heads, head_dim); strides: page, row, head
  fagen_tensor v;           // cache (pages, page_size, kv_heads, head_dim_v)
  fagen_tensor o;           // like q, with head_dim_v; written
  fagen_tensor page_table;  // int32 (batch, pages of a sequence); stride: batch; null where the cache is not paged
  fagen_tensor k_scale;     // float (batch, kv_heads): multiplies an fp8 cache; strides: batch, kv head; null: 1
  fagen_tensor v_scale;
  const int32_t* seqlens_k;        // (batch): keys of each sequence
  const int32_t* cu_seqlens_q;     // (batch + 1): first row of each sequence; null: seqlen_q rows each
  const int32_t* cache_batch_idx;  // (batch): a sequence's page where the cache is not paged; null: its own index
  const float* sinks;              // (heads): a logit that takes weight and has no value; null: none
  float* lse;                      // (batch, heads, seqlen_q) contiguous, natural log; null if not wanted
  void* workspace;                 // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int32_t batch, heads, kv_heads;
  int32_t rows;                       // of q in all
  int32_t seqlen_q, seqlen_k;         // most rows and most keys of a sequence
  int32_t pages, page_size;           // of the cache; rows of a page
  int32_t head_dim, head_dim_v;       // as the caller has them; the kernel works on padded sizes
  int32_t window_left, window_right;  // the band around each sequence's bottom-right aligned diagonal; -1: unbounded
  int32_t num_splits;                 // blocks that share a sequence's keys; 0: chosen by the sizes here
  float scale;                        // multiplies q.k before the softmax
  float softcap;                      // s -> softcap * tanh(s / softcap); 0: off
} fagen_decode_params;

// fagen_params_layout() of the kernel that this header belongs to.
#define FAGEN_PARAMS_LAYOUT "q.data 0 8; q.stride 8 24; k.data 32 8; k.stride 40 24; v.data 64 8; v.stride 72 24; o.data 96 8; o.stride 104 24; page_table.data 128 8; page_table.stride 136 24; k_scale.data 160 8; k_scale.stride 168 24; v_scale.data 192 8; v_scale.stride 200 24; seqlens_k 224 8; cu_seqlens_q 232 8; cache_batch_idx 240 8; sinks 248 8; lse 256 8; workspace 264 8; batch 272 4; heads 276 4; kv_heads 280 4; rows 284 4; seqlen_q 288 4; seqlen_k 292 4; pages 296 4; page_size 300 4; head_dim 304 4; head_dim_v 308 4; window_left 312 4; window_right 316 4; num_splits 320 4; scale 324 4; softcap 328 4; sizeof 336"

#ifdef __cplusplus
extern "C" {
#endif
// Enqueues the kernel on `stream` (a cudaStream_t; ignored on the CPU). 0, or a code for fagen_error().
int fagen_launch(const fagen_decode_params* params, void* stream);
const char* fagen_error(int code);
// What params->workspace must hold; the other fields must be set, pointers aside.
uint64_t fagen_workspace_bytes(const fagen_decode_params* params);
// Name, offset and size of every field of the params as the kernel was built. Another text than FAGEN_PARAMS_LAYOUT:
// this header is of another kernel.
const char* fagen_params_layout(void);
#ifdef __cplusplus
}
#endif
