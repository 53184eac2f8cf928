// The arguments of a row scaling kernel: out[row, :] = a[row, :] * w[row]. Plain C; no torch, no CUDA header.
#pragma once
#include "fagen/abi/tensor.h"

typedef struct fagen_row_scaling_params {
  fagen_tensor a;    // float (rows, columns); strides: row, the others unused
  fagen_tensor out;  // float (rows, columns); strides: row, the others unused
  const float* w;    // (rows)
  float* sums;       // (rows): of each row of out; null if not wanted
  void* workspace;   // unused
  int32_t rows, columns;
} fagen_row_scaling_params;
