// solve() by emitted kernels. build.py emits them and writes kernels.h, a table of them.
#include "solve.h"

#include <math.h>

#include "attention.h"
#include "kernels.h"
#include "memory.h"

namespace {

// The smallest kernel that takes this head dim. Those for aligned rows read 16 bytes at a time.
const Kernel& kernel_for(int head_dim) {
  const bool aligned = head_dim % 4 == 0;
  for (const Kernel& kernel : kKernels)
    if (head_dim <= kernel.head_dim && (aligned || !kernel.aligned)) return kernel;
  fprintf(stderr, "head_dim %d: the largest kernel is for %d\n", head_dim, kKernels[kCount - 1].head_dim);
  exit(1);
}

}  // namespace

Attention::Attention(const float* q, const float* k, const float* v, float* o, int n, int d_model, int h)
    : params(), kernel(&kernel_for(d_model / h)) {
  const int head_dim = d_model / h;
  const auto tensor = [&](const float* data) {
    return fagen_tensor{const_cast<float*>(data), {int64_t(n) * d_model, d_model, head_dim}};
  };
  params.q = tensor(q), params.k = tensor(k), params.v = tensor(v), params.o = tensor(o);
  params.batch = 1, params.heads = params.kv_heads = h, params.seqlen_q = params.seqlen_k = n;
  params.head_dim = params.head_dim_v = head_dim, params.window_left = params.window_right = -1;
  params.scale = 1.f / sqrtf(float(head_dim));
  if (const uint64_t bytes = kernel->workspace_bytes(&params)) params.workspace = allocate(bytes);
}

Attention::~Attention() {
  if (params.workspace) release(params.workspace);
}

void Attention::launch() const {
  const int status = kernel->launch(&params, nullptr);
  if (status == 0) return;
  fprintf(stderr, "the kernel for head dims up to %d: %s\n", kernel->head_dim, kernel->error(status));
  exit(1);
}

void solve(const float* Q, const float* K, const float* V, float* output, int N, int d_model, int h) {
  const size_t bytes = size_t(N) * d_model * sizeof(float);
  float* memory[4];
  for (float*& part : memory) part = static_cast<float*>(allocate(bytes));
  copy(memory[0], Q, bytes), copy(memory[1], K, bytes), copy(memory[2], V, bytes);
  Attention(memory[0], memory[1], memory[2], memory[3], N, d_model, h).launch();
  finish();
  copy(output, memory[3], bytes);
  for (float* part : memory) release(part);
}
