// A launch of an emitted kernel on arrays that lie in the device's memory already.
#pragma once
#include "kernel/kernel.h"

// An emitted kernel: its functions, renamed by build.py, and the head dims that it serves.
struct Kernel {
  int head_dim;  // the largest
  bool aligned;  // only multiples of 4
  int (*launch)(const fagen_forward_params* params, void* stream);
  uint64_t (*workspace_bytes)(const fagen_forward_params* params);
  const char* (*error)(int code);
};

struct Attention {
  fagen_forward_params params;
  const Kernel* kernel;

  Attention(const float* q, const float* k, const float* v, float* o, int n, int d_model, int h);
  ~Attention();
  Attention(const Attention&) = delete;
  void launch() const;
};
