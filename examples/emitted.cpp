// Runs an emitted kernel from C++: no Python, no torch. The kernel is generated/cpu-fp32-d64-causal/kernel.cpp, which is
// one file to read; kernel.h declares all there is to call. From the root of the repository:
//
//   g++ -std=c++17 -O3 -march=native -fopenmp -I generated/cpu-fp32-d64-causal -o emitted examples/emitted.cpp generated/cpu-fp32-d64-causal/kernel.cpp
//   ./emitted
//
// A kernel of your own:  fagen emit --target cpu --dtype fp32 --head-dim 64 --mask causal --out DIR
// With --example it comes with a main.cpp that checks every feature of that kernel, and times it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernel.h"

int main() {
  const int batch = 1, heads = 4, kv_heads = 2, rows = 200, dim = 64;  // any sizes; head_dim and mask are the kernel's
  std::vector<float> q(batch * rows * heads * dim), k(batch * rows * kv_heads * dim), v(k.size()), o(q.size());
  std::vector<float> lse(batch * heads * rows);
  unsigned state = 1;
  for (auto* tensor : {&q, &k, &v})
    for (float& x : *tensor) x = float((state = state * 1664525u + 1013904223u) >> 8) / (1 << 24) - 0.5f;

  fagen_forward_params p = {};
  auto tensor = [&](std::vector<float>& values, int h) {  // contiguous; strides of batch, row and head
    return fagen_tensor{values.data(), {rows * h * dim, h * dim, dim}};
  };
  p.q = tensor(q, heads), p.k = tensor(k, kv_heads), p.v = tensor(v, kv_heads), p.o = tensor(o, heads);
  p.lse = lse.data();
  p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.mask_heads = 1;
  p.seqlen_q = p.seqlen_k = rows, p.head_dim = p.head_dim_v = dim;
  p.window_left = -1, p.window_right = 0;  // causal
  p.scale = 1 / std::sqrt(float(dim));

  if (std::strcmp(fagen_params_layout(), FAGEN_PARAMS_LAYOUT)) return std::puts("kernel.h is of another kernel"), 1;
  std::vector<char> workspace(fagen_workspace_bytes(&p) + 256);
  p.workspace = workspace.data() + (256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256) % 256;
  if (int code = fagen_launch(&p, nullptr)) return std::printf("%s\n", fagen_error(code)), 1;

  // The last row of the last head, in plain loops and double precision.
  const int head = heads - 1, kv = head / (heads / kv_heads), row = rows - 1;
  std::vector<double> sum(dim);
  double total = 0, error = 0;
  for (int j = 0; j <= row; ++j) {
    double score = 0;
    for (int d = 0; d < dim; ++d) score += double(q[(row * heads + head) * dim + d]) * k[(j * kv_heads + kv) * dim + d];
    const double weight = std::exp(score * p.scale);
    total += weight;
    for (int d = 0; d < dim; ++d) sum[d] += weight * v[(j * kv_heads + kv) * dim + d];
  }
  for (int d = 0; d < dim; ++d)
    error = std::fmax(error, std::fabs(o[(row * heads + head) * dim + d] - sum[d] / total));
  error = std::fmax(error, std::fabs(lse[head * rows + row] - std::log(total)));
  std::printf("%s: error %.2g\n", error < 1e-5 ? "right" : "WRONG", error);
  return error < 1e-5 ? 0 : 1;
}
