// Multi-head attention of host arrays in float32: Q, K, V and output are [N, d_model], h heads side by side in a row.
#pragma once

// 1 <= N, 1 <= h, h divides d_model, d_model / h <= 1024. Each head: softmax(Q K^T / sqrt(d_model / h)) V.
void solve(const float* Q, const float* K, const float* V, float* output, int N, int d_model, int h);
