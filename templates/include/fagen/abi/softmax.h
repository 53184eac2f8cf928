// The arguments of a softmax kernel, forward or backward. Plain C; no torch, no CUDA header.
#pragma once
#include "fagen/abi/tensor.h"

// All tensors are (batch, rows, columns); strides: batch and row. The softmax runs along the columns of each row, or
// along the rows of each column, as the kernel was built for.
typedef struct fagen_softmax_params {
  fagen_tensor x;     // read: the input; backward: what forward made of it
  fagen_tensor dout;  // backward: the gradient of what forward made, read; null in forward
  fagen_tensor out;   // written: the softmax or its logarithm; backward: the gradient of the input
  void* workspace;    // fagen_workspace_bytes() bytes, 256-byte aligned; null if that is 0
  int32_t batch, rows, columns;
} fagen_softmax_params;
