// A tensor that a kernel reads or writes, as every op passes it. Plain C; no torch, no CUDA header.
#pragma once
#include <stdint.h>

typedef struct fagen_tensor {
  void* data;         // null if the call has none
  int64_t stride[3];  // in elements; the op says of which dimensions. The last dimension is contiguous.
} fagen_tensor;
