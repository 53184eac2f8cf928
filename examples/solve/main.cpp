// Checks solve() against float64 and times it beside the textbook's way.
//
//   solve check [samples] [seed]   the corners of the domain, and random samples of it; 0 when all are right
//   solve time [N d_model h]       the kernel, the call with its copies, the textbook's kernels
#include <math.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#include "attention.h"
#include "memory.h"
#include "solve.h"
#include "textbook.h"

struct Size {
  int n, d_model, h;
};
enum class Values { random, equal, signs, zero, last };

struct Arrays {
  std::vector<float> q, k, v;
};

static std::mt19937_64 generator;

static int between(int first, int last) { return std::uniform_int_distribution<int>(first, last)(generator); }

static float value(Values values, size_t index) {
  if (values == Values::random) return std::uniform_real_distribution<float>(-10.f, 10.f)(generator);
  if (values == Values::signs) return between(0, 1) ? 10.f : -10.f;
  return values == Values::zero ? 0.f : 10.f;
}

static Arrays make_arrays(Size size, Values values) {
  const size_t count = size_t(size.n) * size.d_model;
  Arrays made;
  for (std::vector<float>* array : {&made.q, &made.k, &made.v}) {
    array->resize(count);
    for (size_t i = 0; i < count; ++i) (*array)[i] = value(array == &made.v ? Values::random : values, i);
  }
  return made;
}

// The largest error of some rows of all heads, by the definition in float64.
static double error_of(const Arrays& in, const std::vector<float>& output, Size size, const std::vector<int>& rows) {
  const int d = size.d_model / size.h;
  double worst = 0;
  std::vector<double> weights(size.n), sums(d);
  for (int head = 0; head < size.h; ++head)
    for (int row : rows) {
      const size_t at = size_t(row) * size.d_model + size_t(head) * d;
      double top = -INFINITY, total = 0;
      for (int key = 0; key < size.n; ++key) {
        double sum = 0;
        for (int i = 0; i < d; ++i) sum += double(in.q[at + i]) * in.k[size_t(key) * size.d_model + head * d + i];
        weights[key] = sum / sqrt(double(d)), top = std::max(top, weights[key]);
      }
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int key = 0; key < size.n; ++key) {
        const double weight = exp(weights[key] - top);
        total += weight;
        for (int i = 0; i < d; ++i) sums[i] += weight * in.v[size_t(key) * size.d_model + head * d + i];
      }
      for (int i = 0; i < d; ++i) {
        const double error = fabs(output[at + i] - sums[i] / total);
        if (!(error <= worst)) worst = error;  // NaN as well, which then stays
      }
    }
  return worst;
}

// Scores reach 100 sqrt(head_dim) = 3200, which float32 rounds by 1.2e-4 and their sums by more; weights are off by as
// much, relative to themselves, and values by that times 10.
constexpr double kTolerance = 2e-3;
constexpr float kGuard = 12345.f;

static bool check(Size size, Values values) {
  const Arrays in = make_arrays(size, values);
  const size_t count = in.q.size();
  std::vector<float> output(count + 2, kGuard);
  std::fill(output.begin() + 1, output.end() - 1, NAN);
  solve(in.q.data(), in.k.data(), in.v.data(), output.data() + 1, size.n, size.d_model, size.h);
  const bool guarded = output.front() == kGuard && output.back() == kGuard;
  output.erase(output.begin()), output.pop_back();
  std::vector<int> rows;  // all of a small problem, of others the first, the last and some between
  const int some = std::max<int64_t>(4, int64_t(4e6) / (int64_t(size.n) * size.d_model));
  for (int i = 0; i < std::min(size.n, some); ++i) rows.push_back(some >= size.n ? i : between(0, size.n - 1));
  rows.front() = 0, rows.back() = size.n - 1;
  const double error = error_of(in, output, size, rows);
  const bool right = guarded && error <= kTolerance;
  if (!right || error > 0.5 * kTolerance)
    printf("%s N %d d_model %d h %d values %d: error %.3g%s\n", right ? "near" : "WRONG", size.n, size.d_model, size.h,
           int(values), error, guarded ? "" : ", and something beside the output was written");
  static double worst = 0;
  if (error > worst) printf("largest error so far %.3g: N %d d_model %d h %d\n", worst = error, size.n, size.d_model, size.h);
  return right;
}

static int random_divisor(int number) {
  std::vector<int> divisors;
  for (int i = 1; i <= number; ++i)
    if (number % i == 0) divisors.push_back(i);
  return divisors[between(0, int(divisors.size()) - 1)];
}

static int check_all(int samples, int seed) {
  generator.seed(seed);
  int wrong = 0, count = 0;
  for (int n : {1, 2, 31, 33, 64, 65, 127, 129, 1000})
    for (int d_model : {2, 3, 7, 60, 512, 1023, 1024})
      for (int h : {1, d_model % 2 ? d_model : d_model / 2, d_model})
        if (n <= 129 || d_model > 1000) wrong += !check({n, d_model, h}, Values::random), ++count;
  for (Values values : {Values::equal, Values::signs, Values::zero})
    for (Size size : {Size{1000, 1024, 16}, Size{129, 1024, 1}, Size{65, 60, 3}}) wrong += !check(size, values), ++count;
  for (int i = 0; i < samples; ++i) {
    const int n = between(0, 3) ? between(1, 200) : between(1, 1000), d_model = between(2, 1024);
    wrong += !check({n, d_model, random_divisor(d_model)}, between(0, 4) ? Values::random : Values::signs), ++count;
  }
  printf("%s: %d of %d calls within %g of float64\n", wrong ? "WRONG" : "right", count - wrong, count, kTolerance);
  return wrong ? 1 : 0;
}

template <class Run>
static double seconds(Run run) {
  run(), finish();
  double total = 0, best = INFINITY;
  for (int round = 0; round < 20 && (round < 3 || total < 2); ++round) {
    const auto start = std::chrono::steady_clock::now();
    run(), finish();
    const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    total += took, best = std::min(best, took);
  }
  return best;
}

static int time_all(Size size) {
  generator.seed(1);
  const Arrays in = make_arrays(size, Values::random);
  const size_t bytes = in.q.size() * sizeof(float);
  std::vector<float> output(in.q.size());
  float* memory[4];
  for (float*& part : memory) part = static_cast<float*>(allocate(bytes));
  copy(memory[0], in.q.data(), bytes), copy(memory[1], in.k.data(), bytes), copy(memory[2], in.v.data(), bytes);
  float* scores = static_cast<float*>(allocate(size_t(size.h) * size.n * size.n * sizeof(float)));
  const Attention attention(memory[0], memory[1], memory[2], memory[3], size.n, size.d_model, size.h);
  const double kernel = seconds([&] { attention.launch(); });
  const double call = seconds(
      [&] { solve(in.q.data(), in.k.data(), in.v.data(), output.data(), size.n, size.d_model, size.h); });
  const double naive = seconds(
      [&] { textbook(memory[0], memory[1], memory[2], memory[3], scores, size.n, size.d_model, size.h); });
  printf("N %d d_model %d h %d: kernel %.4g ms, solve() with its copies %.4g ms, textbook %.4g ms: kernel %.1fx faster\n",
         size.n, size.d_model, size.h, kernel * 1e3, call * 1e3, naive * 1e3, naive / kernel);
  for (float* part : memory) release(part);
  release(scores);
  return 0;
}

int main(int argc, char** argv) {
  const auto number = [&](int i, int otherwise) { return i < argc ? atoi(argv[i]) : otherwise; };
  if (argc > 1 && !strcmp(argv[1], "check")) return check_all(number(2, 60), number(3, 1));
  if (argc > 1 && !strcmp(argv[1], "time")) {
    const Size size = {number(2, 1000), number(3, 1024), number(4, 16)};
    if (size.n < 1 || size.h < 1 || size.d_model < 1 || size.d_model % size.h)
      return fprintf(stderr, "N, d_model and h are at least 1, and h divides d_model\n"), 2;
    return time_all(size);
  }
  return fprintf(stderr, "solve check [samples] [seed] | solve time [N d_model h]\n"), 2;
}
