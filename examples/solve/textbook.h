// The same by kernels as a textbook first writes them: all scores in memory, a thread a number.
#pragma once
#include <math.h>

#include "memory.h"

#ifdef __CUDACC__

// scores[head][row][key]
__global__ void textbook_scores(const float* q, const float* k, float* scores, int n, int d_model, int h) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y, head = blockIdx.z, d = d_model / h;
  if (key >= n) return;
  float sum = 0.f;
  for (int i = 0; i < d; ++i) sum += q[row * d_model + head * d + i] * k[key * d_model + head * d + i];
  scores[(size_t(head) * n + row) * n + key] = sum / sqrtf(float(d));
}
// One thread a row.
__global__ void textbook_softmax(float* scores, int n, int rows) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  float* mine = scores + size_t(row) * n;
  float top = -INFINITY, total = 0.f;
  for (int i = 0; i < n; ++i) top = fmaxf(top, mine[i]);
  for (int i = 0; i < n; ++i) total += mine[i] = expf(mine[i] - top);
  for (int i = 0; i < n; ++i) mine[i] /= total;
}
__global__ void textbook_output(const float* scores, const float* v, float* o, int n, int d_model, int h) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (column >= d_model) return;
  const float* weights = scores + (size_t(column / (d_model / h)) * n + row) * n;
  float sum = 0.f;
  for (int key = 0; key < n; ++key) sum += weights[key] * v[key * d_model + column];
  o[row * d_model + column] = sum;
}

inline void textbook(const float* q, const float* k, const float* v, float* o, float* scores, int n, int d_model, int h) {
  const unsigned rows = unsigned(n);
  textbook_scores<<<dim3((n + 255) / 256, rows, h), 256>>>(q, k, scores, n, d_model, h);
  textbook_softmax<<<(n * h + 255) / 256, 256>>>(scores, n, n * h);
  textbook_output<<<dim3((d_model + 255) / 256, rows), 256>>>(scores, v, o, n, d_model, h);
  must(cudaGetLastError(), "the textbook's kernels");
}

#else

inline void textbook(const float* q, const float* k, const float* v, float* o, float* scores, int n, int d_model, int h) {
  const int d = d_model / h;
  for (int head = 0; head < h; ++head)
    for (int row = 0; row < n; ++row) {
      float* mine = scores + (size_t(head) * n + row) * n;
      float top = -INFINITY, total = 0.f;
      for (int key = 0; key < n; ++key) {
        float sum = 0.f;
        for (int i = 0; i < d; ++i) sum += q[row * d_model + head * d + i] * k[key * d_model + head * d + i];
        mine[key] = sum / sqrtf(float(d)), top = fmaxf(top, mine[key]);
      }
      for (int key = 0; key < n; ++key) total += mine[key] = expf(mine[key] - top);
      for (int i = 0; i < d; ++i) {
        float sum = 0.f;
        for (int key = 0; key < n; ++key) sum += mine[key] / total * v[key * d_model + head * d + i];
        o[row * d_model + head * d + i] = sum;
      }
    }
}

#endif
