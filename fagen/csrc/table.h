// The arguments of a call, and the table that knows its kernel.
//
// The table is keyed by every fact of a call that validation and dispatch read. A hit is therefore a call that was
// checked before. A miss asks Python (op `resolve`), which checks, chooses, builds and loads, and answers with the
// kernel's functions, or with nothing when PyTorch itself shall compute.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "fagen/params.h"

namespace fagen {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kAlignment = 16;            // bytes, of every row of an aligned problem
constexpr int64_t kWorkspaceAlignment = 256;  // bytes
constexpr size_t kMaxEntries = 1 << 16;  // then the table starts anew: sizes that vary for ever must not fill memory

// ---- the arguments of a call ----------------------------------------------------------------------------------------

struct Call {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const MaybeTensor& intervals;
  const MaybeTensor& alibi_slopes;
  bool bhsd;
  bool causal;
  int64_t window_left;
  int64_t window_right;
  double softcap;
  std::optional<double> scale;

  int64_t right() const { return causal ? 0 : window_right; }  // a window's own right bound is at least 0
  int row() const { return bhsd ? 2 : 1; }
  int head() const { return bhsd ? 1 : 2; }
};

// The signatures of the ops, which all begin with the fields of Call.
#define FAGEN_PARAMS                                                                                                \
  const Tensor &q, const Tensor &k, const Tensor &v, const MaybeTensor &intervals, const MaybeTensor &alibi_slopes, \
      bool bhsd, bool causal, int64_t window_left, int64_t window_right, double softcap, std::optional<double> scale
#define FAGEN_ARGS q, k, v, intervals, alibi_slopes, bhsd, causal, window_left, window_right, softcap, scale
#define FAGEN_SCHEMA                                                                                \
  "Tensor q, Tensor k, Tensor v, Tensor? intervals, Tensor? alibi_slopes, bool bhsd, bool causal, " \
  "int window_left, int window_right, float softcap, float? scale"
#define FAGEN_FIELDS(c) \
  c.q, c.k, c.v, c.intervals, c.alibi_slopes, c.bhsd, c.causal, c.window_left, c.window_right, c.softcap, c.scale

using Forward = Tensor(FAGEN_PARAMS);
using ForwardLse = std::tuple<Tensor, Tensor>(FAGEN_PARAMS);
using Fallback = std::tuple<Tensor, Tensor>(FAGEN_PARAMS, bool);
using Resolve = std::vector<int64_t>(FAGEN_PARAMS, const MaybeTensor&, bool);

template <class Signature>
c10::TypedOperatorHandle<Signature> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// ---- the table ------------------------------------------------------------------------------------------------------

struct Facts {
  std::array<int64_t, 31> words{};

  // Sizes, dtype, device and the contiguity of the last dimension of a tensor of up to four dimensions.
  void put(size_t at, const Tensor& t) {
    const int64_t dims = t.dim();
    const int64_t device = (static_cast<int64_t>(t.device().type()) << 8) | static_cast<uint8_t>(t.device().index());
    const int64_t contiguous = t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1;
    words[at] = (device << 16) | (static_cast<int64_t>(t.scalar_type()) << 4) | (contiguous << 3) | dims;
    for (int64_t i = 0; i < dims; ++i) words[at + 1 + i] = t.size(i);
  }
  bool operator==(const Facts& other) const { return words == other.words; }
};

struct HashFacts {
  size_t operator()(const Facts& facts) const {
    uint64_t hash = 0x9e3779b97f4a7c15u;
    for (int64_t word : facts.words) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 0xff51afd7ed558ccdu;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

// As fagen.kernel.is_aligned: a stride of zero counts as not aligned.
bool rows_aligned(const Tensor& t) {
  const int64_t item = t.element_size();
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment || t.size(3) * item % kAlignment) return false;
  for (int i = 0; i < 3; ++i) {
    if (t.size(i) > 1 && (t.stride(i) == 0 || t.stride(i) * item % kAlignment)) return false;
  }
  return true;
}

// Everything that decides whether the call is legal and which kernel serves it; false if the ranks alone are wrong.
bool facts_of(const Call& c, const Tensor* out, bool want_lse, Facts& facts) {
  if (c.q.dim() != 4 || c.k.dim() != 4 || c.v.dim() != 4 || (out && out->dim() != 4)) return false;
  if (c.intervals && c.intervals->dim() != 4) return false;
  if (c.alibi_slopes && c.alibi_slopes->dim() != 1 && c.alibi_slopes->dim() != 2) return false;
  facts.put(0, c.q);
  facts.put(5, c.k);
  facts.put(10, c.v);
  if (out) facts.put(15, *out);
  // a fresh output starts at an aligned address
  const bool out_aligned = out ? rows_aligned(*out) : c.v.size(3) * c.q.element_size() % kAlignment == 0;
  const bool aligned = out_aligned && rows_aligned(c.q) && rows_aligned(c.k) && rows_aligned(c.v);
  const int64_t capped = c.softcap == 0 ? 0 : c.softcap > 0 ? 1 : 2;
  facts.words[20] = (static_cast<int64_t>(want_lse) << 5) | (capped << 3) | (aligned << 2) | (c.bhsd << 1) |
                    static_cast<int64_t>(c.causal);
  facts.words[21] = c.window_left;
  facts.words[22] = c.right();
  if (c.alibi_slopes) facts.put(23, *c.alibi_slopes);
  if (c.intervals) facts.put(26, *c.intervals);
  return true;
}

// A kernel's functions; `launch` is null where PyTorch computes.
struct Entry {
  int (*launch)(const fagen_params*, void*) = nullptr;
  const char* (*error)(int) = nullptr;
  uint64_t (*workspace_bytes)(const fagen_params*) = nullptr;
};

std::mutex table_lock;
std::unordered_map<Facts, Entry, HashFacts>& table() {
  static auto* entries = new std::unordered_map<Facts, Entry, HashFacts>();  // outlives every thread that may call
  return *entries;
}

Entry ask_python(const Call& c, const Tensor* out, bool want_lse) {
  static const auto op = handle<Resolve>("fagen::resolve");
  const auto addresses = op.call(FAGEN_FIELDS(c), out ? MaybeTensor(*out) : MaybeTensor(), want_lse);
  Entry entry;
  if (addresses.size() == 3) {
    entry.launch = reinterpret_cast<decltype(entry.launch)>(addresses[0]);
    entry.error = reinterpret_cast<decltype(entry.error)>(addresses[1]);
    entry.workspace_bytes = reinterpret_cast<decltype(entry.workspace_bytes)>(addresses[2]);
  }
  return entry;
}

Entry find(const Call& c, const Tensor* out, bool want_lse) {
  Facts facts;
  if (!facts_of(c, out, want_lse, facts)) return ask_python(c, out, want_lse);  // which raises the fitting error
  {
    std::lock_guard<std::mutex> guard(table_lock);
    const auto found = table().find(facts);
    if (found != table().end()) return found->second;
  }
  const Entry entry = ask_python(c, out, want_lse);  // may compile: never under the lock
  std::lock_guard<std::mutex> guard(table_lock);
  if (table().size() >= kMaxEntries) table().clear();
  table()[facts] = entry;
  return entry;
}

void forget() {
  std::lock_guard<std::mutex> guard(table_lock);
  table().clear();
}

}  // namespace fagen
