// The arguments of a call, and the table that knows its kernel.
//
// The table is keyed by every fact of a call that validation and dispatch read. A hit is therefore a call that was
// checked before. A size that is new to known static facts is checked and resolved here, by the plan of those facts:
// the record nearest to the size decides, as dispatch/choose.py would. Everything else asks Python (op `resolve`),
// which checks, chooses, builds and loads, and answers with the kernel's functions and with the plan of the static
// facts.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "constants.h"  // made by binding.py: facts that Python declares, PyTorch's switch for TF32
#include "fagen/abi/forward.h"

namespace fagen {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kAlignment = 16;  // bytes, of every row of an aligned problem
constexpr int64_t kWorkspaceAlignment = 256;  // bytes
constexpr size_t kMaxEntries = 1 << 16;  // then the table starts anew: sizes that vary for ever must not fill memory

// ---- the arguments of a call ----------------------------------------------------------------------------------------

// The one list of what every op begins with: X(type, name, type in the schema). Call, the schemas, the signatures and
// the key of the table follow from it. `OpArguments` of ops/attention/call.py is the same list in Python.
#define FAGEN_ARGUMENTS(X)                       \
  X(const Tensor&, q, "Tensor")                  \
  X(const Tensor&, k, "Tensor")                  \
  X(const Tensor&, v, "Tensor")                  \
  X(const MaybeTensor&, intervals, "Tensor?")    \
  X(const MaybeTensor&, alibi_slopes, "Tensor?") \
  X(bool, bhsd, "bool")                          \
  X(bool, causal, "bool")                        \
  X(int64_t, window_left, "int")                 \
  X(int64_t, window_right, "int")                \
  X(double, softcap, "float")                    \
  X(std::optional<double>, scale, "float?")      \
  X(bool, deterministic, "bool")                 \
  X(double, dropout, "float")                    \
  X(const MaybeTensor&, rng, "Tensor?")

struct Call {
#define FAGEN_FIELD(type, name, schema) type name;
  FAGEN_ARGUMENTS(FAGEN_FIELD)
#undef FAGEN_FIELD

  // All fields, as an op takes them.
  auto arguments() const {
#define FAGEN_TUPLE(type, name, schema) std::tuple<type>(name),
    return std::tuple_cat(FAGEN_ARGUMENTS(FAGEN_TUPLE) std::tuple<>());
#undef FAGEN_TUPLE
  }

  // Whether `test` holds for each tensor that is there.
  template <class Test>
  bool all_tensors(Test test) const {
    const auto holds = [&test](const auto& argument) {
      using Type = std::decay_t<decltype(argument)>;
      if constexpr (std::is_same_v<Type, Tensor>) return test(argument);
      if constexpr (std::is_same_v<Type, MaybeTensor>) return !argument || test(*argument);
      return true;
    };
    return std::apply([&holds](const auto&... each) { return (holds(each) && ...); }, arguments());
  }

  int row() const { return bhsd ? 2 : 1; }
  int head() const { return bhsd ? 1 : 2; }
};

// What is wanted of a call: its output, or the gradients of q, k and v.
struct Wanted {
  const Tensor* out = nullptr;  // where the output goes, if the caller said so
  bool lse = false;
  bool gradients = false;
};

using Arguments = decltype(std::declval<const Call&>().arguments());

// The arguments in a schema, in words.
std::string schema() {
#define FAGEN_SCHEMA(type, name, schema) ", " schema " " #name
  return std::string(FAGEN_ARGUMENTS(FAGEN_SCHEMA)).substr(2);
#undef FAGEN_SCHEMA
}

template <class Result, class All, class... Own>
struct SignatureOf;
template <class Result, class... Each, class... Own>
struct SignatureOf<Result, std::tuple<Each...>, Own...> {
  using Type = Result(Each..., Own...);
};
// The signature of an op that takes a call, and arguments of its own behind it.
template <class Result, class... Own>
using Signature = typename SignatureOf<Result, Arguments, Own...>::Type;

using Forward = Signature<Tensor>;
using ForwardLse = Signature<std::tuple<Tensor, Tensor>>;
using ForwardOut = Signature<Tensor, bool, Tensor&>;
using Fallback = Signature<std::tuple<Tensor, Tensor>, bool>;
using Resolve = Signature<std::vector<int64_t>, const MaybeTensor&, bool>;
using ResolveBackward = Signature<std::vector<int64_t>>;
using Overlap = Signature<void, const Tensor&>;

template <class Function>
c10::TypedOperatorHandle<Function> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Function>();
}

template <class Function, class... Own>
auto call_op(const c10::TypedOperatorHandle<Function>& op, const Call& c, Own&&... own) {
  const auto with = [&](auto&&... each) { return op.call(each..., std::forward<Own>(own)...); };
  return std::apply(with, c.arguments());
}

// A function of a call and of arguments of its own, as an op: AsOp<function>::op.
template <auto kFunction, class All = Arguments>
struct AsOp;
template <class Result, class... Own, Result (*kFunction)(const Call&, Own...), class... Each>
struct AsOp<kFunction, std::tuple<Each...>> {
  static Result op(Each... each, Own... own) {
    Call c{each...};
    if (c.causal) c.window_right = 0;  // a window's own right bound is at least 0
    return kFunction(c, own...);
  }
};

// ---- the facts of a call --------------------------------------------------------------------------------------------

constexpr size_t kTensorWords = 5;

template <class Each>
constexpr size_t kWordsOf =
    std::is_same_v<Each, const Tensor&> || std::is_same_v<Each, const MaybeTensor&> ? kTensorWords
                                                                                    : std::is_same_v<Each, int64_t>;
template <class All>
constexpr size_t kWordsOfAll = 0;
template <class... Each>
constexpr size_t kWordsOfAll<std::tuple<Each...>> = (kWordsOf<Each> + ...);

struct Facts {
  // flags, `out`, the arguments; an even number of words
  std::array<int64_t, (1 + kTensorWords + kWordsOfAll<Arguments> + 1) / 2 * 2> words{};

  bool operator==(const Facts& other) const { return words == other.words; }
};

struct HashFacts {
  size_t operator()(const Facts& facts) const {
    uint64_t even = 0x9e3779b97f4a7c15u, odd = 0;  // a CPU multiplies for both at once
    for (size_t i = 0; i < facts.words.size(); i += 2) {
      even = (even ^ static_cast<uint64_t>(facts.words[i])) * 0xff51afd7ed558ccdu;
      odd = (odd ^ static_cast<uint64_t>(facts.words[i + 1])) * 0xff51afd7ed558ccdu;
      even ^= even >> 32;
      odd ^= odd >> 32;
    }
    return even ^ (odd * 0xc4ceb9fe1a85ec53u);
  }
};

// Writes what counts of each argument. Without sizes, tensors of other lengths, heads and batch are the same: of a
// tensor's sizes only the fourth is left, the head_dim, or the columns of intervals.
template <bool kSizes>
class FactsWriter {
 public:
  explicit FactsWriter(Facts& facts) : words_(facts.words) {}

  void flag(bool value) { flags_ |= static_cast<int64_t>(value) << bit_++; }
  void finish() { words_[0] = flags_; }

  // Sizes, dtype, device and the contiguity of the last dimension of a tensor of up to four dimensions.
  void put(const Tensor* t) {
    if (t) {
      const int64_t dims = t->dim();
      const int64_t device =
          (static_cast<int64_t>(t->device().type()) << 8) | static_cast<uint8_t>(t->device().index());
      const int64_t contiguous = t->size(dims - 1) <= 1 || t->stride(dims - 1) == 1;
      words_[at_] = (device << 16) | (static_cast<int64_t>(t->scalar_type()) << 4) | (contiguous << 3) | dims;
      for (int64_t i = kSizes ? 0 : 3; i < dims; ++i) words_[at_ + 1 + i] = t->size(i);
    }
    at_ += kTensorWords;
  }
  void put(const Tensor& t) { put(&t); }
  void put(const MaybeTensor& t) { put(t ? &*t : nullptr); }
  void put(bool value) { flag(value); }
  void put(int64_t bound) { words_[at_++] = kSizes ? bound : 0; }
  void put(double number) { flag(number > 0), flag(number < 0); }
  void put(const std::optional<double>&) {}  // any scale that a kernel takes: entry_for leaves others to PyTorch

 private:
  decltype(Facts::words)& words_;
  size_t at_ = 1;
  int64_t flags_ = 0;
  int bit_ = 0;
};

// As ops/attention/arguments.is_aligned: a stride of zero counts as not aligned.
bool rows_aligned(const Tensor& t) {
  const int64_t item = t.element_size();
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment || t.size(3) * item % kAlignment) return false;
  for (int i = 0; i < 3; ++i) {
    if (t.size(i) > 1 && (t.stride(i) == 0 || t.stride(i) * item % kAlignment)) return false;
  }
  return true;
}

// As ops/attention/tf32.py: whether products of the call may be rounded to TF32, at this moment.
bool tf32_allowed(const Tensor& q) { return q.is_cuda() && q.scalar_type() == at::kFloat && switch_allows_tf32(); }

bool ranks_are_right(const Call& c, const Wanted& wanted) {
  const Tensor* out = wanted.out;
  if (c.q.dim() != 4 || c.k.dim() != 4 || c.v.dim() != 4 || (out && out->dim() != 4)) return false;
  if ((c.intervals && c.intervals->dim() != 4) || (c.rng && c.rng->dim() != 1)) return false;
  return !c.alibi_slopes || c.alibi_slopes->dim() == 1 || c.alibi_slopes->dim() == 2;
}

// Everything that decides whether a call of the right ranks is legal and which kernel serves it. Without sizes, what is
// the same for all calls of a plan.
template <bool kSizes>
Facts facts_of(const Call& c, const Wanted& wanted) {
  const Tensor* out = wanted.out;
  Facts facts;
  FactsWriter<kSizes> write(facts);
  write.put(out);
  std::apply([&write](const auto&... each) { (write.put(each), ...); }, c.arguments());
  // a fresh output starts at an aligned address
  const bool out_aligned = out ? rows_aligned(*out) : c.v.size(3) * c.q.element_size() % kAlignment == 0;
  write.flag(out_aligned && rows_aligned(c.q) && rows_aligned(c.k) && rows_aligned(c.v));
  write.flag(wanted.lse);
  write.flag(wanted.gradients);
  write.flag(tf32_allowed(c.q));
  write.flag(c.window_left < 0 && c.window_right < 0);  // no mask
  write.flag(c.window_left < 0 && c.window_right == 0);  // causal; else a window
  write.finish();
  return facts;
}

// ---- plans ----------------------------------------------------------------------------------------------------------

// A kernel's functions; `launch` is null where PyTorch computes.
struct Entry {
  int (*launch)(const void*, void*) = nullptr;  // of the op's params, and a stream
  const char* (*error)(int) = nullptr;
  uint64_t (*workspace_bytes)(const void*) = nullptr;
};

// What a plan knows to serve sizes with: nothing yet, so that Python must be asked; or an entry.
struct Answer {
  bool known = false;
  Entry entry;
};

struct Sizes {
  int64_t batch, heads, kv_heads, seqlen_q, seqlen_k, left, right;

  bool same(const Sizes& other, bool windowed) const {
    return batch == other.batch && heads == other.heads && kv_heads == other.kv_heads && seqlen_q == other.seqlen_q &&
           seqlen_k == other.seqlen_k && (!windowed || (left == other.left && right == other.right));
  }
  int64_t group() const { return heads / kv_heads; }
  // Tiles of rows of the heads that share keys, so many of them side by side.
  int64_t packed_tiles(int64_t tile, int64_t packed) const {
    const int64_t rows = tile / packed;
    return (seqlen_q + rows - 1) / rows * (group() / packed);
  }
  // As size_point.packed_heads.
  int64_t packed_heads(int64_t tile) const {
    int64_t best = 1, fewest = packed_tiles(tile, 1);
    for (int64_t packed = 2; packed <= std::min(group(), kMostPacked); ++packed) {
      if (group() % packed) continue;
      const int64_t tiles = packed_tiles(tile, packed);
      fewest = std::min(fewest, tiles);
      if (16 * tiles <= 17 * fewest) best = packed;
    }
    return best;
  }
  int64_t seen_keys() const { return left >= 0 ? std::min(seqlen_k, left + seqlen_q) : seqlen_k; }
};

// As db.features: what of a size decides which config wins, in doublings.
struct Features {
  double keys, waves, rows;

  Features(const Sizes& s, int64_t units) {
    const int64_t left = s.left < 0 ? s.seqlen_k : s.left, right = s.right < 0 ? s.seqlen_k : s.right;
    const double blocks = static_cast<double>((s.seqlen_q + kWaveRows - 1) / kWaveRows);
    const double work = static_cast<double>(s.batch) * static_cast<double>(s.heads) * blocks;
    const double of_device = work / static_cast<double>(std::max<int64_t>(1, units));
    keys = std::log2(static_cast<double>(std::min(s.seqlen_k, left + right + 1)));
    waves = std::log2(std::min(std::max(of_device, kLeastWaves), kMostWaves));
    rows = std::log2(static_cast<double>(s.seqlen_q));
  }

  // As db.distance, added up in the same order.
  double distance(const Features& other) const {
    return kSizeWeights.keys * std::abs(keys - other.keys) + kSizeWeights.waves * std::abs(waves - other.waves) +
           kSizeWeights.rows * std::abs(rows - other.rows);
  }
};

// Which sizes other records serve: those of few rows, and of heads that share keys; as size_point.regime.
struct FewRows {
  int64_t most_idle_tiles = -1;  // so few tiles of rows that blocks should share keys
  int64_t most_rows = -1;  // of a kv head
  int64_t packs = 0;  // whether there are kernels that pack heads

  int64_t regime(const Sizes& s) const { return has(s) + 2 * (packs && s.heads > s.kv_heads); }
  bool has(const Sizes& s) const {
    const int64_t tiles = s.packed_tiles(kTileRows, s.packed_heads(kTileRows)) * s.kv_heads * s.batch;
    const int64_t keys = s.seen_keys();
    return (tiles <= most_idle_tiles && keys >= kSharedKeys) || s.seqlen_q * s.group() <= most_rows;
  }
};

// Tiles of rows by tiles of keys, and the cycles that they take; as ops/attention/tiling.py, in the same order.
struct Tiling {
  int64_t rows, keys, packing, visit, start;

  static constexpr int64_t kPacked = 1,
                           kAlone = 2;  // heads that share keys lie in one tile; only heads that share none

  explicit Tiling(int64_t code)
      : rows(code >> 50),
        keys(code >> 38 & 0xfff),
        packing(code >> 36 & 3),
        visit(code >> 18 & 0x3ffff),
        start(code & 0x3ffff) {}

  double cycles(const Sizes& s, int64_t units) const {
    const int64_t packed = packing == kPacked ? s.packed_heads(rows) : 1, right = s.right;
    if ((packing == kPacked && packed == 1) || (packing == kAlone && s.group() > 1))
      return std::numeric_limits<double>::infinity();
    const bool even = right < 0 && s.left < 0;
    const int64_t seeing = even ? s.seqlen_q : std::min(s.seqlen_q, s.seqlen_k + std::max<int64_t>(0, right));
    const int64_t tile = rows / packed, tiles = std::max<int64_t>(1, (seeing + tile - 1) / tile);
    const auto [most, mean] = visits(s, seeing, tile, tiles, s.left >= 0 ? tile : 64 / packed, right);
    const double pieces = double(tiles) * double(s.group() / packed) * double(s.kv_heads) * double(s.batch);
    const double last = most * double(visit) + double(start), each = mean * double(visit) + double(start);
    if (pieces <= double(units)) return last;
    return even ? std::ceil(pieces / double(units)) * each : pieces * each / double(units) + kTail * last;
  }

 private:
  std::pair<double, double> visits(const Sizes& s, int64_t seeing, int64_t tile, int64_t tiles, int64_t own,
                                   int64_t right) const {
    double most = double((s.seqlen_k + keys - 1) / keys), seen = double(s.seqlen_k);
    if (right < 0 && s.left < 0) return {most, most};
    if (right >= 0) {
      const int64_t ends = std::max<int64_t>(1, (seeing + own - 1) / own),
                    some = std::max<int64_t>(0, seeing - right) / own;
      const double missing =
          double(some) * double(seeing - right) - 0.5 * double(own) * double(some) * double(some + 1);
      const double whole = double((keys - s.seqlen_k % keys) % keys) * double(ends - some);
      seen += (mean_part(seeing - right - s.seqlen_k, own) * double(some) + whole - missing) / double(ends);
    }
    if (s.left >= 0) {
      const int64_t hidden = s.seqlen_k - seeing - s.left;
      const int64_t first = std::min(tiles, hidden >= 0 ? 0 : (-hidden + tile - 1) / tile), some = tiles - first;
      const double missing =
          0.5 * double(tile) * double(first + tiles - 1) * double(some) + double(hidden) * double(some);
      seen += (mean_part(hidden, tile) * double(some) - missing) / double(tiles);
      if (right >= 0) most = std::min(most, double((s.left + tile + right + keys - 1) / keys + 1));
    }
    return {most, std::max(0.0, std::min(most, seen / double(keys)))};
  }
  double mean_part(int64_t first, int64_t step) const {
    const int64_t least = std::gcd(step, keys);
    return 0.5 * double(keys - least) + double((first % least + least) % least);
  }
};

// What defaults ask of a size: whether a measure is at most a limit (ops/attention/measures.py names them, in this
// order), whether one tiling is no dearer than another (-1), or at most so many cycles (-2).
struct Test {
  int64_t measure, tile, limit;

  bool holds(const Sizes& s, const FewRows& few_rows, int64_t units) const {
    if (measure == -1) return Tiling(tile).cycles(s, units) <= Tiling(limit).cycles(s, units);
    if (measure == -2) return Tiling(tile).cycles(s, units) <= double(limit);
    return measured(s, few_rows) <= limit;
  }

 private:
  int64_t measured(const Sizes& s, const FewRows& few_rows) const {
    const auto tiles = [this](int64_t n) { return (n + tile - 1) / tile; };
    const int64_t packed = s.packed_heads(std::max(tile, kTileRows));
    const int64_t measures[] = {
        s.seqlen_k,
        s.seen_keys(),
        s.seqlen_q,
        std::min(s.seqlen_q, s.seqlen_k),
        packed,
        s.seqlen_q * packed,
        tiles(s.seqlen_q) * s.heads * s.batch,
        tiles(s.seqlen_k) * s.kv_heads * s.batch,
        few_rows.has(s),
    };
    return measures[measure];
  }
};

// Defaults: of one family, or of all of them in turn. Sizes of which the same tests hold have the same one.
struct Defaults {
  bool by_tests = false;  // else Python must be asked about each size
  std::vector<Test> tests;
  std::vector<std::pair<int64_t, Answer>> known;  // by the tests that hold, a bit each

  const Answer& find(const Sizes& sizes, const FewRows& few_rows, int64_t units) const {
    static const Answer ask;
    if (!by_tests) return ask;
    int64_t hold = 0;
    for (size_t i = 0; i < tests.size(); ++i) hold |= static_cast<int64_t>(tests[i].holds(sizes, few_rows, units)) << i;
    for (const auto& [bits, answer] : known) {
      if (bits == hold) return answer;
    }
    return ask;
  }
};

// A record that may serve sizes of the static facts.
struct Row {
  bool elsewhere;  // tuned on another device
  Sizes sizes;
  Features features;
  Answer answer;
  Answer where_torch_may;  // the same, or what is faster than its kernel where PyTorch can be asked: itself, or another
  int64_t confirms, may_confirms;  // whose defaults serve in the place of each at other sizes than its own; 0: none's
};

// What is known of static facts. Rows lie in the order in which ties are settled.
struct Plan {
  int64_t units = 1;
  bool windowed = false;  // whether a window's bounds are part of a size
  int64_t torch = 0;  // whether PyTorch can be asked in the place of a slower kernel: 1 always, 2 for square sizes
  FewRows few_rows;
  std::vector<Defaults> defaults;  // the first ones where there are no rows of a regime, others where rows say so
  std::vector<Row> rows;

  // How much farther a record of another device counts, as in db/store.py.
  static constexpr double kElsewhere = 1.0;

  // The index of the row that serves a size, -1 where there are none of its regime: the nearest; of those a record of
  // this device before others, of exactly this size before others.
  int64_t nearest(const Sizes& sizes) const {
    const Features wanted(sizes, units);
    const int64_t regime = few_rows.regime(sizes);
    int64_t best = -1;
    int best_rank = 0;
    double best_distance = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (few_rows.regime(rows[i].sizes) != regime) continue;
      const int rank = 2 * rows[i].elsewhere + !rows[i].sizes.same(sizes, windowed);
      const double distance = wanted.distance(rows[i].features) + (rows[i].elsewhere ? kElsewhere : 0.0);
      if (best < 0 || distance < best_distance || (distance == best_distance && rank < best_rank)) {
        best = static_cast<int64_t>(i), best_rank = rank, best_distance = distance;
      }
    }
    return best;
  }

  const Answer& find(const Sizes& sizes) const {
    const int64_t row = nearest(sizes);
    if (row < 0) return defaults[0].find(sizes, few_rows, units);
    const Row& found = rows[row];
    const bool may = torch == 1 || (torch == 2 && sizes.seqlen_q == sizes.seqlen_k);
    const int64_t confirms = may ? found.may_confirms : found.confirms;
    if (confirms && !found.sizes.same(sizes, windowed)) return defaults[confirms].find(sizes, few_rows, units);
    return may ? found.where_torch_may : found.answer;
  }
};

// Plans and answers come from Python as words; dispatch/plan.py writes them.
constexpr size_t kAnswerWords = 4, kPlanWords = 7, kRowWords = 10 + 2 * kAnswerWords;

Answer answer_of(const int64_t* words) {
  Answer answer;
  answer.known = words[0] != 0;
  answer.entry.launch = reinterpret_cast<decltype(Entry::launch)>(words[1]);
  answer.entry.error = reinterpret_cast<decltype(Entry::error)>(words[2]);
  answer.entry.workspace_bytes = reinterpret_cast<decltype(Entry::workspace_bytes)>(words[3]);
  return answer;
}

// Reads on from `words`.
Defaults defaults_of(const int64_t*& words) {
  const int64_t tests = words[0], known = words[1];
  Defaults defaults;
  defaults.by_tests = tests >= 0;
  words += 2;
  for (int64_t i = 0; i < tests; ++i, words += 3) defaults.tests.push_back({words[0], words[1], words[2]});
  for (int64_t i = 0; i < known; ++i, words += 1 + kAnswerWords) {
    defaults.known.emplace_back(words[0], answer_of(words + 1));
  }
  return defaults;
}

Plan plan_of(const int64_t* words, size_t count) {
  Plan plan;
  plan.units = words[0];
  plan.windowed = words[1] != 0;
  plan.torch = words[2];
  plan.few_rows = {words[3], words[4], words[5]};
  const int64_t *w = words + kPlanWords, *end = words + count;
  for (int64_t i = 0; i < words[6]; ++i) plan.defaults.push_back(defaults_of(w));
  for (; w + kRowWords <= end; w += kRowWords) {
    const Sizes sizes{w[1], w[2], w[3], w[4], w[5], w[6], w[7]};
    const Answer answer = answer_of(w + 10), where_torch_may = answer_of(w + 10 + kAnswerWords);
    plan.rows.push_back(Row{w[0] != 0, sizes, Features(sizes, plan.units), answer, where_torch_may, w[8], w[9]});
  }
  return plan;
}

// ---- sizes
// ------------------------------------------------------------------------------------------------------------

Sizes sizes_of(const Call& c) {
  return {c.q.size(0),       c.q.size(c.head()), c.k.size(c.head()), c.q.size(c.row()),
          c.k.size(c.row()), c.window_left,      c.window_right};
}

// What AttentionCall.of wants of sizes, given that a call of the same static facts passed it; and no size is 0, which
// PyTorch answers. Python finds the words for what is wrong.
bool sizes_agree(const Call& c, const Tensor* out) {
  const Sizes s = sizes_of(c);
  for (int64_t size : {s.batch, s.heads, s.kv_heads, s.seqlen_q, s.seqlen_k}) {
    if (size < 1 || size > INT32_MAX) return false;
  }
  if (s.left < -1 || s.left > INT32_MAX || s.right < -1 || s.right > INT32_MAX || s.heads % s.kv_heads) return false;
  for (const Tensor* t : {&c.k, &c.v}) {
    if (t->size(0) != s.batch || t->size(c.row()) != s.seqlen_k || t->size(c.head()) != s.kv_heads) return false;
  }
  if (out && (out->size(0) != c.q.size(0) || out->size(1) != c.q.size(1) || out->size(2) != c.q.size(2))) return false;
  if (c.alibi_slopes) {
    const Tensor& t = *c.alibi_slopes;
    if (t.size(-1) != s.heads || (t.dim() == 2 && t.size(0) != 1 && t.size(0) != s.batch)) return false;
  }
  if (c.intervals) {
    const Tensor& t = *c.intervals;
    if ((t.size(0) != 1 && t.size(0) != s.batch) || (t.size(1) != 1 && t.size(1) != s.kv_heads)) return false;
    if (t.size(2) != s.seqlen_k) return false;
  }
  return !c.rng || c.rng->size(0) == 2;
}

// ---- the table ------------------------------------------------------------------------------------------------------

std::mutex table_lock;
uint64_t generation = 0;  // grows when everything is forgotten: what was asked for before is not kept after

// These outlive every thread that may call.
std::unordered_map<Facts, Entry, HashFacts>& table() {
  static auto* entries = new std::unordered_map<Facts, Entry, HashFacts>();
  return *entries;
}
std::unordered_map<Facts, Plan, HashFacts>& plans() {
  static auto* known = new std::unordered_map<Facts, Plan, HashFacts>();
  return *known;
}

// Under the lock.
void remember(const Facts& facts, const Entry& entry) {
  if (table().size() >= kMaxEntries) table().clear();
  table()[facts] = entry;
}

// `facts`: what to remember the answer under, if the ranks are right.
Entry ask_python(const Call& c, const Wanted& wanted, const Facts* facts) {
  static const auto op = handle<Resolve>("fagen::resolve");
  static const auto op_backward = handle<ResolveBackward>("fagen::resolve_backward");
  uint64_t before;
  {
    std::lock_guard<std::mutex> guard(table_lock);
    before = generation;
  }
  // may compile: no lock is held
  const auto words = wanted.gradients
                         ? call_op(op_backward, c)
                         : call_op(op, c, wanted.out ? MaybeTensor(*wanted.out) : MaybeTensor(), wanted.lse);
  const Answer answer = answer_of(words.data());
  std::lock_guard<std::mutex> guard(table_lock);
  if (!facts || generation != before || !answer.known) return answer.entry;
  remember(*facts, answer.entry);
  if (words.size() >= kAnswerWords + kPlanWords) {
    if (plans().size() >= kMaxEntries) plans().clear();
    plans()[facts_of<false>(c, wanted)] = plan_of(words.data() + kAnswerWords, words.size() - kAnswerWords);
  }
  return answer.entry;
}

Entry find(const Call& c, const Wanted& wanted) {
  if (!ranks_are_right(c, wanted)) return ask_python(c, wanted, nullptr);  // which raises the error
  const Facts facts = facts_of<true>(c, wanted);
  {
    std::lock_guard<std::mutex> guard(table_lock);
    const auto found = table().find(facts);
    if (found != table().end()) return found->second;
    const auto known = plans().find(facts_of<false>(c, wanted));
    if (known != plans().end() && sizes_agree(c, wanted.out)) {
      const Answer& answer = known->second.find(sizes_of(c));
      if (answer.known) {
        remember(facts, answer.entry);
        return answer.entry;
      }
    }
  }
  return ask_python(c, wanted, &facts);
}

void forget() {
  std::lock_guard<std::mutex> guard(table_lock);
  ++generation;
  table().clear();
  plans().clear();
}

}  // namespace fagen
