// The arguments of a forward kernel on fp8 numbers (e4m3). Plain C; no torch, no CUDA header.
#pragma once
#include "fagen/abi/forward.h"

// q and k hold e4m3 numbers, and so does v, in the kernel's order: (batch, kv_heads, blocks of 32 keys, head_dim_v,
// 32), a block's 32 * head_dim_v bytes as sm90/forward_fp8/value_order.cuh says. The strides of v are those of batch,
// block and head. O is of 16-bit elements. A descale is float (batch, kv_heads), strides: batch, kv head; null: 1. What
// it multiplies is what the tensor stands for. A kernel for blocks of so many rows wants those of q and k for each of
// them, (batch, heads of the tensor, blocks), strides: batch, head, block.
typedef struct fagen_forward_fp8_params {
  fagen_forward_params forward;  // its workspace is not read
  fagen_tensor descale_q;
  fagen_tensor descale_k;
  fagen_tensor descale_v;
  void* workspace;  // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
} fagen_forward_fp8_params;
