// The arguments of the kernel that makes the intervals of packed sequences. Plain C; no torch, no CUDA header.
#pragma once
#include <stdint.h>

// Sequence i has rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] and keys likewise. A band is aligned bottom-right within
// each sequence: a row sees no key more than `left` before its diagonal, or `right` behind it; -1 for no bound.
typedef struct fagen_packed_bounds_params {
  const void* cu_seqlens_q;  // (sequences + 1), of int64 where `wide`, else of int32
  const void* cu_seqlens_k;
  int32_t*
      intervals;  // (seqlen_k, columns): rows from the first number on do not see the key, nor those before the second
  int32_t sequences, seqlen_q, seqlen_k, columns, wide, left, right;
} fagen_packed_bounds_params;
