// A loop of decoding around an emitted kernel: no Python, no torch. Three sequences, whose prompts have unequal lengths,
// grow by a token a step in a cache of pages; a toy model of one attention layer picks each token by its largest logit.
// A plain loop in double precision follows: every result of the kernel and every token is checked against it. From the
// root of the repository, on the CPU and on a Hopper GPU:
//
//   g++ -std=c++17 -O3 -march=native -fopenmp -I generated/cpu-bf16-d128-decode-page16 -I examples -o decode_loop examples/decode_loop.cpp generated/cpu-bf16-d128-decode-page16/kernel.cpp
//   nvcc -std=c++17 -O3 -arch=sm_90 --use_fast_math -I generated/sm80-bf16-d128-decode-page16 -I examples -o decode_loop -x cu examples/decode_loop.cpp generated/sm80-bf16-d128-decode-page16/kernel.cu
//   ./decode_loop
//
// A kernel of your own:  fagen emit --op decode --target sm_80 --dtype bf16 --head-dim 128 --page 16 --out DIR
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernel.h"
#include "solve/memory.h"

using bfloat = uint16_t;  // the upper half of a float
using Floats = std::vector<float>;
using Row = std::vector<bfloat>;

constexpr int kBatch = 3, kSteps = 40, kMostKeys = 128;
constexpr int kHeads = 32, kKvHeads = 8, kDim = 128, kPage = 16;  // head_dim and page are the kernel's
constexpr int kWidth = 48, kTokens = 200;                         // of the toy
constexpr int kPagesEach = kMostKeys / kPage, kPages = kBatch * kPagesEach;
constexpr int kRowOfQ = kHeads * kDim, kRowOfKey = kKvHeads * kDim;

static bfloat narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bfloat((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static float widen(bfloat x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// ---- the toy --------------------------------------------------------------------------------------------------------

static float random_number() {  // from -1 to 1
  static uint32_t state = 1;
  return float((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1;
}
static Floats random_matrix(int rows, int columns) {
  Floats matrix(size_t(rows) * columns);
  for (float& x : matrix) x = random_number() * std::sqrt(3.f / columns);  // keeps the size of what it multiplies
  return matrix;
}

struct Model {
  Floats embedding = random_matrix(kTokens * kWidth, 1);
  Floats to_q = random_matrix(kRowOfQ, kWidth), to_k = random_matrix(kRowOfKey, kWidth);
  Floats to_v = random_matrix(kRowOfKey, kWidth), from_o = random_matrix(kTokens, kRowOfQ);

  Row project(const Floats& matrix, int token) const {
    Row row(matrix.size() / kWidth);
    for (size_t i = 0; i < row.size(); ++i) {
      float sum = 0;
      for (int j = 0; j < kWidth; ++j) sum += matrix[i * kWidth + j] * embedding[size_t(token) * kWidth + j];
      row[i] = narrow(sum);
    }
    return row;
  }
  template <class Number>
  std::vector<double> logits(const std::vector<Number>& o, double (*value)(Number)) const {
    std::vector<double> found(kTokens, 0.0);
    for (int token = 0; token < kTokens; ++token)
      for (int i = 0; i < kRowOfQ; ++i) found[token] += double(from_o[size_t(token) * kRowOfQ + i]) * value(o[i]);
    return found;
  }
};

static int largest(const std::vector<double>& x) { return int(std::max_element(x.begin(), x.end()) - x.begin()); }

// ---- the cache ------------------------------------------------------------------------------------------------------

// Where the kernel reads, and as much on the host as appending needs. Pages are handed out as sequences need them.
struct Cache {
  bfloat* k = static_cast<bfloat*>(allocate(sizeof(bfloat) * kPages * kPage * kRowOfKey));
  bfloat* v = static_cast<bfloat*>(allocate(sizeof(bfloat) * kPages * kPage * kRowOfKey));
  int32_t* table = static_cast<int32_t*>(allocate(sizeof(int32_t) * kPages));
  int32_t* lengths = static_cast<int32_t*>(allocate(sizeof(int32_t) * kBatch));
  std::vector<int32_t> pages = std::vector<int32_t>(kPages, -1), keys = std::vector<int32_t>(kBatch, 0);
  int32_t used = 0;

  void append(int sequence, const Row& key, const Row& value) {
    const int at = keys[sequence]++;
    int32_t& page = pages[sequence * kPagesEach + at / kPage];
    if (at % kPage == 0) page = used++;
    const size_t offset = (size_t(page) * kPage + at % kPage) * kRowOfKey;
    copy(k + offset, key.data(), sizeof(bfloat) * kRowOfKey);
    copy(v + offset, value.data(), sizeof(bfloat) * kRowOfKey);
  }
  void show() const {  // to the kernel
    copy(table, pages.data(), sizeof(int32_t) * kPages);
    copy(lengths, keys.data(), sizeof(int32_t) * kBatch);
  }
};

// Made once: a step changes what the pointers lead to. seqlen_k bounds the lengths, which the kernel reads.
static fagen_decode_params make_params(const Cache& cache, bfloat* q, bfloat* o) {
  fagen_decode_params p = {};
  p.q = {q, {kRowOfQ, kRowOfQ, kDim}}, p.o = {o, {kRowOfQ, kRowOfQ, kDim}};
  p.k = {cache.k, {kPage * kRowOfKey, kRowOfKey, kDim}}, p.v = {cache.v, {kPage * kRowOfKey, kRowOfKey, kDim}};
  p.page_table = {cache.table, {kPagesEach}};
  p.seqlens_k = cache.lengths;
  p.batch = p.rows = kBatch, p.heads = kHeads, p.kv_heads = kKvHeads;
  p.seqlen_q = 1, p.seqlen_k = kMostKeys, p.pages = kPages, p.page_size = kPage;
  p.head_dim = p.head_dim_v = kDim, p.window_left = p.window_right = -1;
  p.scale = 1 / std::sqrt(float(kDim));
  if (const uint64_t bytes = fagen_workspace_bytes(&p)) p.workspace = allocate(bytes);
  return p;
}

// ---- the plain loop -------------------------------------------------------------------------------------------------

// All keys and values of a sequence, one behind the other.
struct History {
  std::vector<Row> keys, values;
};

// Attention of one row as the definition says, and the sizes by which its rounding is judged.
static std::vector<double> attend(const History& all, const Row& q, std::vector<double>* sizes) {
  std::vector<double> o(kRowOfQ, 0.0), weights(all.keys.size());
  sizes->assign(kRowOfQ, 0.0);
  for (int head = 0; head < kHeads; ++head) {
    const int from = head / (kHeads / kKvHeads) * kDim;
    double total = 0;
    for (size_t key = 0; key < weights.size(); ++key) {
      double score = 0;
      for (int d = 0; d < kDim; ++d) score += double(widen(q[head * kDim + d])) * widen(all.keys[key][from + d]);
      total += weights[key] = std::exp(score / std::sqrt(double(kDim)));
    }
    for (size_t key = 0; key < weights.size(); ++key)
      for (int d = 0; d < kDim; ++d) {
        const double term = weights[key] / total * widen(all.values[key][from + d]);
        o[head * kDim + d] += term, (*sizes)[head * kDim + d] += std::fabs(term);
      }
  }
  return o;
}

// ---- the run --------------------------------------------------------------------------------------------------------

struct Checks {
  double error = 0;
  int tokens = 0, first_choices = 0, wrong = 0;

  // Weights and result are each rounded once; twice that is allowed. So the best of the plain loop's logits and the one
  // of the token that was picked differ by what that rounding can do to them.
  void compare(const Model& model, const Row& o, int token, const History& all, const Row& q) {
    std::vector<double> sizes;
    const std::vector<double> plain = attend(all, q, &sizes);
    for (double& size : sizes) size *= 4 * std::ldexp(1, -9);
    bool good = true;
    for (int i = 0; i < kRowOfQ; ++i) {
      const double off = std::fabs(widen(o[i]) - plain[i]);
      error = std::isnan(off) ? off : std::max(error, off), good &= off <= sizes[i] + 1e-6;
    }
    const auto same = +[](double x) { return x; };
    const std::vector<double> logits = model.logits(plain, same);
    const int choice = largest(logits);
    double doubt = 0;
    const float *best = &model.from_o[size_t(choice) * kRowOfQ], *picked = &model.from_o[size_t(token) * kRowOfQ];
    for (int i = 0; i < kRowOfQ; ++i) doubt += std::fabs(best[i] - picked[i]) * sizes[i];
    good &= logits[choice] - logits[token] <= doubt;
    ++tokens, first_choices += choice == token, wrong += !good;
  }
};

int main() {
  if (strcmp(fagen_params_layout(), FAGEN_PARAMS_LAYOUT)) return puts("kernel.h is of another kernel"), 1;
  const Model model;
  Cache cache;
  History histories[kBatch];
  const auto append = [&](int sequence, int token) {
    histories[sequence].keys.push_back(model.project(model.to_k, token));
    histories[sequence].values.push_back(model.project(model.to_v, token));
    cache.append(sequence, histories[sequence].keys.back(), histories[sequence].values.back());
  };
  int tokens[kBatch];
  for (int b = 0; b < kBatch; ++b) {
    for (int i = 0; i < 35 * b; ++i) append(b, (7 * i + b) % kTokens);  // a prompt, but for its last token
    tokens[b] = b;
  }

  bfloat* const q_memory = static_cast<bfloat*>(allocate(sizeof(bfloat) * kBatch * kRowOfQ));
  bfloat* const o_memory = static_cast<bfloat*>(allocate(sizeof(bfloat) * kBatch * kRowOfQ));
  const fagen_decode_params p = make_params(cache, q_memory, o_memory);
  Checks checks;
  for (int step = 0; step < kSteps; ++step) {
    Row q[kBatch], o(kRowOfQ);
    for (int b = 0; b < kBatch; ++b) {
      append(b, tokens[b]);
      q[b] = model.project(model.to_q, tokens[b]);
      copy(q_memory + b * kRowOfQ, q[b].data(), sizeof(bfloat) * kRowOfQ);
    }
    cache.show();
    if (const int code = fagen_launch(&p, nullptr)) return printf("fagen_launch: %s\n", fagen_error(code)), 1;
    finish();
    for (int b = 0; b < kBatch; ++b) {
      copy(o.data(), o_memory + b * kRowOfQ, sizeof(bfloat) * kRowOfQ);
      const auto value = +[](bfloat x) { return double(widen(x)); };
      tokens[b] = largest(model.logits(o, value));
      checks.compare(model, o, tokens[b], histories[b], q[b]);
    }
  }
  printf("%s: %d tokens, %d of them the plain loop's first choice; largest error %.2g\n",
         checks.wrong ? "WRONG" : "right", checks.tokens, checks.first_choices, checks.error);
  return checks.wrong ? 1 : 0;
}
