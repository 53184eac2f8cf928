// The arguments of the kernel that applies attention sinks to an output, and differentiates that. Plain C; no torch, no
// CUDA header.
#pragma once
#include "fagen/abi/tensor.h"

// A sink is a logit a head that joins the sum of its rows' softmax and has no value. Strides are of batch, row and
// head. LSEs and what is like them are (batch, heads, rows), contiguous. Where `dout` is there, gradients are wanted.
//
// Numbers of dtypes: 0 float, 1 half, 2 bfloat16.
typedef struct fagen_sinks_params {
  fagen_tensor out;  // without sinks
  fagen_tensor dout;  // the gradient of the output with sinks
  fagen_tensor to;  // the output with sinks, which may be `out` itself; or the gradient of `out`
  const float* lse;  // without sinks
  const float* dlse;  // the gradient of the LSE with sinks; null if there is none
  float* lse_to;  // the LSE with sinks, which may be `lse` itself; or the gradient of `lse`
  float* shares;  // what each row adds to the gradient of its head's sink
  const void* sinks;  // (heads)
  int32_t batch, rows, heads, head_dim, element, sink_element;
} fagen_sinks_params;
