// The arguments of a decode kernel: few query rows a sequence on a cache of keys. Plain C; no torch, no CUDA header.
#pragma once
#include "fagen/abi/tensor.h"

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
