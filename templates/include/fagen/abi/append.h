// The arguments of the kernel that writes new keys and values to a cache. Plain C; no torch, no CUDA header.
#pragma once
#include "fagen/abi/tensor.h"

// New rows of a sequence stand behind the keys that it has. Keys, and rows of q with them, are turned by the angles of
// their positions first: the first 2 * half columns of each head. Packed rows, with cu_seqlens, lie one behind the
// other and have no stride of a sequence. The last dimension of every tensor is contiguous.
//
// Numbers of dtypes: 0 float, 1 half, 2 bfloat16.
typedef struct fagen_append_params {
  fagen_tensor k_new;       // (batch, most_new, kv_heads, head_dim); strides: sequence, row, head
  fagen_tensor v_new;       // the same with head_dim_v
  fagen_tensor k;           // cache (pages, page_size, kv_heads, head_dim); strides: page, row, head; written
  fagen_tensor v;
  fagen_tensor q;           // (batch, most_rows, heads, head_dim); null: there is no rotary embedding
  fagen_tensor q_turned;    // like q; written
  fagen_tensor page_table;  // int32 (batch, table_pages); stride: batch; null where the cache is not paged
  fagen_tensor k_scale;     // float (batch, kv_heads): an fp8 cache holds rows divided by it; null: 1
  fagen_tensor v_scale;
  fagen_tensor cos;  // (positions, half); stride: position; null: there is no rotary embedding
  fagen_tensor sin;
  const int32_t* seqlens_k;        // (batch): keys of each sequence before
  const int32_t* cu_seqlens_q;     // (batch + 1): first row of q of each sequence; null: most_rows each
  const int32_t* cu_seqlens_new;   // (batch + 1): first new row of each sequence; null: most_new each
  const int32_t* cache_batch_idx;  // (batch): a sequence's page where the cache is not paged; null: its own index
  const int32_t* rotary_seqlens;   // (batch): position of the first row of each sequence; null: seqlens_k
  int32_t* seqlens_after;          // (batch); written
  int32_t batch, heads, kv_heads, head_dim, head_dim_v;
  int32_t rows, new_rows;       // of q, and of k_new, in all
  int32_t most_rows, most_new;  // of a sequence
  int32_t most_keys;            // of a sequence, the new ones counted: nothing is written behind them
  int32_t pages, page_size, table_pages;
  int32_t half, positions;  // the shape of cos
  int32_t interleaved;      // pairs are neighbouring columns, else columns of two halves
  int32_t banded;           // rows of q stand one behind the other, else all at the first one's position
  int32_t element;          // the dtype of q and of the new rows
  int32_t fp8_cache;        // else it has the dtype of the new rows
  int32_t angle;            // the dtype of cos and sin
} fagen_append_params;
