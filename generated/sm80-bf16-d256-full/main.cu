// An example and a check of the kernel beside it: makes random inputs, runs the kernel, compares rows of the result
// with a plain computation in double precision, and times it. Returns 0 when the kernel is right.
//
//   problem: forward/bf16/d256/none/b4/h8-8/q4096-k4096
//   build:   nvcc -gencode=arch=compute_90,code=sm_90 -O3 -std=c++17 --use_fast_math -lineinfo -o example kernel.cu main.cu
//   run:     ./example
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "kernel.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// ---- the problem ----------------------------------------------------------------------------------------------------

constexpr int kBatch = 4, kHeads = 8, kKvHeads = 8;
constexpr int kRows = 4096, kKeys = 4096;
constexpr int kDim = 256, kDimV = 256;
constexpr int kLeft = -1, kRight = -1;  // the band; -1: unbounded
constexpr int kColumns = 0;  // row bounds a key carries
constexpr int kLTS = -1, kLTE = -1, kUTS = -1, kUTE = -1;  // columns of theirs; -1: absent
constexpr float kSoftcap = 0.f;
constexpr bool kAlibi = false;
constexpr double kFlops = 549755813888.0;  // of the visible cells
constexpr double kUnit = 0.001953125;    // relative rounding error of bf16 (of the computation for fp32)

// ---- numbers --------------------------------------------------------------------------------------------------------

using Element = uint16_t;  // the upper half of a float
static Element narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static double widen(Element x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static uint64_t random_state = 1;
static uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(random_state >> 33);
}
static int random_below(int n) { return int(random_bits() % uint32_t(n)); }
static float random_normal() {  // near enough: four uniform numbers
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += float(random_bits()) * (1.f / 2147483648.f) - 0.5f;
  return sum * 1.7320508f;
}

// ---- memory and time ------------------------------------------------------------------------------------------------

static void must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  exit(4);
}
static void* allocate(size_t bytes) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, bytes ? bytes : 1), "cudaMalloc");
  must(cudaMemset(memory, 0xff, bytes), "cudaMemset");  // NaN: what the kernel leaves out shows
  return memory;
}
static void copy(void* to, const void* from, size_t bytes) {
  must(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}
static void finish() { must(cudaDeviceSynchronize(), "the kernel"); }

template <class T>
static T* upload(const std::vector<T>& values) {
  T* memory = static_cast<T*>(allocate(values.size() * sizeof(T)));
  copy(memory, values.data(), values.size() * sizeof(T));
  return memory;
}

// ---- inputs ---------------------------------------------------------------------------------------------------------

struct Inputs {
  std::vector<Element> q, k, v;
  std::vector<int32_t> intervals;
  std::vector<float> slopes;
};

static std::vector<Element> random_tensor(size_t count) {
  std::vector<Element> values(count);
  for (Element& value : values) value = narrow(random_normal());
  return values;
}

// Documents of random lengths; where a key carries more bounds than they need, some rows become visible again.
static std::vector<int32_t> random_intervals() {
  std::vector<int32_t> bounds(size_t(kBatch) * kKvHeads * kKeys * kColumns);
  for (int part = 0; part < kBatch * kKvHeads && kColumns > 0; ++part) {
    int start = 0, end = 0;
    for (int key = 0; key < kKeys; ++key) {
      const int row = int(int64_t(key) * kRows / kKeys);
      if (row >= end) start = end, end = std::min(kRows, end + 1 + random_below(kRows / 2 + 1));
      int32_t* of_key = &bounds[(size_t(part) * kKeys + key) * kColumns];
      if (kLTS >= 0) of_key[kLTS] = end;
      if (kLTE >= 0) of_key[kLTE] = end + (kRows - end) * 3 / 4;
      if (kUTS >= 0) of_key[kUTS] = start / 4;
      if (kUTE >= 0) of_key[kUTE] = start;
    }
  }
  return bounds;
}

static Inputs random_inputs() {
  Inputs in;
  in.q = random_tensor(size_t(kBatch) * kRows * kHeads * kDim);
  in.k = random_tensor(size_t(kBatch) * kKeys * kKvHeads * kDim);
  in.v = random_tensor(size_t(kBatch) * kKeys * kKvHeads * kDimV);
  if (kColumns > 0) in.intervals = random_intervals();
  for (int h = 0; kAlibi && h < kHeads; ++h) in.slopes.push_back(std::exp2(-8.f * float(h + 1) / kHeads));
  return in;
}

// Contiguous (batch, row, head, element) tensors; any other strides with contiguous elements would do.
static fagen_forward_params make_params(const Inputs& in, Element* o, float* lse) {
  fagen_forward_params p = {};
  const auto tensor = [](void* data, int64_t rows, int64_t heads, int64_t dim) {
    return fagen_tensor{data, {rows * heads * dim, heads * dim, dim}};
  };
  p.q = tensor(upload(in.q), kRows, kHeads, kDim);
  p.k = tensor(upload(in.k), kKeys, kKvHeads, kDim);
  p.v = tensor(upload(in.v), kKeys, kKvHeads, kDimV);
  p.o = tensor(o, kRows, kHeads, kDimV);
  p.lse = lse;
  p.batch = kBatch, p.heads = kHeads, p.kv_heads = kKvHeads, p.seqlen_q = kRows, p.seqlen_k = kKeys;
  p.head_dim = kDim, p.head_dim_v = kDimV, p.window_left = kLeft, p.window_right = kRight;
  p.scale = 1.f / std::sqrt(float(kDim)), p.softcap = kSoftcap;
  if (kColumns > 0) {
    p.intervals = tensor(upload(in.intervals), kKvHeads, kKeys, kColumns);  // its rows are the mask heads
    p.mask_heads = kKvHeads;
  }
  if (kAlibi) p.alibi_slopes.data = upload(in.slopes);  // one row for all batches: the stride stays 0
  if (const uint64_t bytes = fagen_workspace_bytes(&p)) p.workspace = allocate(bytes);
  return p;
}

// ---- the reference --------------------------------------------------------------------------------------------------

static bool visible(const Inputs& in, int b, int kv_head, int row, int key) {
  const int diagonal = row + kKeys - kRows;
  if (kLeft >= 0 && key < diagonal - kLeft) return false;
  if (kRight >= 0 && key > diagonal + kRight) return false;
  if (kColumns == 0) return true;
  const int32_t* of_key = &in.intervals[((size_t(b) * kKvHeads + kv_head) * kKeys + key) * kColumns];
  const bool below = row >= of_key[kLTS] && (kLTE < 0 || row < of_key[kLTE < 0 ? 0 : kLTE]);
  const bool above = kUTE >= 0 && row < of_key[kUTE < 0 ? 0 : kUTE] && (kUTS < 0 || row >= of_key[kUTS < 0 ? 0 : kUTS]);
  return !below && !above;
}

struct Errors {
  double o = 0, lse = 0, worst = 0;  // worst: the largest error over its bound
  void add(double mine, double want, double bound, double* largest) {
    const double error = mine == want ? 0 : std::fabs(mine - want);  // equal infinities differ by 0
    const double ratio = error <= bound ? error / bound : std::numeric_limits<double>::infinity();  // NaN too
    *largest = std::isnan(error) ? error : std::max(*largest, error);
    worst = std::max(worst, ratio);
  }
};

// One row, as the definition says: scores, softmax, weighted sum.
static void check_row(const Inputs& in, const Element* o, const float* lse, int b, int h, int row, Errors* errors) {
  const int kv_head = h / (kHeads / kKvHeads);
  const Element* q = &in.q[((size_t(b) * kRows + row) * kHeads + h) * kDim];
  const double infinity = std::numeric_limits<double>::infinity(), scale = 1 / std::sqrt(double(kDim));
  std::vector<double> score(kKeys, -infinity), sum(kDimV, 0.0), size(kDimV, 0.0);
  double top = -infinity, total = 0;
  for (int key = 0; key < kKeys; ++key) {
    if (!visible(in, b, kv_head, row, key)) continue;
    const Element* k = &in.k[((size_t(b) * kKeys + key) * kKvHeads + kv_head) * kDim];
    double s = 0;
    for (int i = 0; i < kDim; ++i) s += widen(q[i]) * widen(k[i]);
    s *= scale;
    if (kSoftcap > 0) s = kSoftcap * std::tanh(s * (1 / (kSoftcap > 0 ? kSoftcap : 1)));
    if (kAlibi) s -= double(in.slopes[h]) * std::abs(row + kKeys - kRows - key);
    score[key] = s, top = std::max(top, s);
  }
  for (int key = 0; key < kKeys; ++key) {
    if (score[key] == -infinity) continue;
    double weight = std::exp(score[key] - top);
    const Element* v = &in.v[((size_t(b) * kKeys + key) * kKvHeads + kv_head) * kDimV];
    total += weight;
    for (int i = 0; i < kDimV; ++i) sum[i] += weight * widen(v[i]), size[i] += weight * std::fabs(widen(v[i]));
  }
  const double shrink = total > 0 ? 1 / total : 0, want_lse = total > 0 ? top + std::log(total) : -infinity;
  const Element* mine = &o[((size_t(b) * kRows + row) * kHeads + h) * kDimV];
  // weights and result are each rounded once; twice that is allowed
  for (int i = 0; i < kDimV; ++i) {
    errors->add(widen(mine[i]), sum[i] * shrink, 4 * kUnit * size[i] * shrink + 1e-6, &errors->o);
  }
  errors->add(lse[(size_t(b) * kHeads + h) * kRows + row], want_lse, total > 0 ? 1e-3 * (1 + std::fabs(want_lse)) : 0, &errors->lse);
}

// ---- the run --------------------------------------------------------------------------------------------------------

static void launch(const fagen_forward_params& p) {
  if (const int code = fagen_launch(&p, nullptr)) {
    fprintf(stderr, "fagen_launch: %s\n", fagen_error(code));
    exit(1);
  }
}

static double seconds_of_one(const fagen_forward_params& p) {
  double total = 0;
  int count = 0;
  for (int repeat = 1; total < 0.2; repeat *= 2) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < repeat; ++i) launch(p);
    finish();
    total = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), count = repeat;
  }
  return total / count;
}

int main() {
  if (strcmp(fagen_params_layout(), FAGEN_PARAMS_LAYOUT) != 0) return fprintf(stderr, "kernel.h is of another kernel\n"), 1;
  const Inputs in = random_inputs();
  std::vector<Element> o(size_t(kBatch) * kRows * kHeads * kDimV);
  std::vector<float> lse(size_t(kBatch) * kHeads * kRows);
  Element* o_memory = static_cast<Element*>(allocate(o.size() * sizeof(Element)));
  float* lse_memory = static_cast<float*>(allocate(lse.size() * sizeof(float)));
  const fagen_forward_params p = make_params(in, o_memory, lse_memory);
  launch(p);
  finish();
  copy(o.data(), o_memory, o.size() * sizeof(Element));
  copy(lse.data(), lse_memory, lse.size() * sizeof(float));

  // all rows of a small problem; of a large one as many as a second or two allow, first and last ones among them
  const int64_t all = int64_t(kBatch) * kHeads * kRows, affordable = int64_t(1e9) / (int64_t(kKeys) * (kDim + kDimV)) + 2;
  const int64_t checked = std::min(all, affordable);
  Errors errors;
  for (int64_t i = 0; i < checked; ++i) {
    const int64_t at = checked == all ? i : i * (all - 1) / (checked - 1);
    check_row(in, o.data(), lse.data(), int(at / (int64_t(kHeads) * kRows)), int(at / kRows % kHeads), int(at % kRows), &errors);
  }
  const bool right = errors.worst <= 1;
  const double seconds = seconds_of_one(p);
  printf("forward/bf16/d256/none/b4/h8-8/q4096-k4096\n%s: largest error %.3g, of lse %.3g, %.2f of the bound; %lld of %lld rows checked\n",
         right ? "right" : "WRONG", errors.o, errors.lse, errors.worst, (long long)checked, (long long)all);
  printf("%.3f ms", seconds * 1e3);
  if (kColumns == 0) printf(", %.1f GFLOP/s", kFlops / seconds / 1e9);  // intervals hide cells that kFlops counts
  printf("\n");
  return right ? 0 : 1;
}
