// A call's params, and the launch of the kernel that an entry of the table names.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cmath>
#include <limits>

#include "table.h"

namespace fagen {

// ---- what a kernel cannot be asked --------------------------------------------------------------------------------

constexpr int64_t kLongest = 1 << 29;  // rows or keys: what a kernel takes for "without bound" lies there
constexpr double kLeast = std::numeric_limits<float>::min();  // as in ops/attention/arguments.py
constexpr double kLargest = 2.3e38;

// Whether a kernel's float32 holds them, and their quotient.
bool held(double softcap, double scale) {
  if (softcap == 0) return std::abs(scale) <= kLargest;
  return softcap >= std::max(kLeast, std::abs(scale) / kLargest) && std::max(softcap, std::abs(scale)) <= kLargest;
}

// Sizes and numbers that 32 bits do not hold, and what is no probability. Python refuses them before; a traced or a
// direct call is seen only here.
void refuse_numbers(const Call& c) {
  static const auto refuse = handle<void(c10::string_view, c10::string_view)>("fagen::refuse");
  int64_t bits = 0;  // of all sizes
  for (const Tensor* t : {&c.q, &c.k, &c.v})
    for (const int64_t size : t->sizes()) bits |= size;
  if (bits > INT32_MAX) refuse.call("a size is beyond 2^31 - 1", "");
  if (!held(c.softcap, c.scale.value_or(1)))
    refuse.call("softcap and scale must be finite and of float32's range, softcap not negative", "");
  if (!(c.dropout >= 0 && c.dropout <= 1)) refuse.call("dropout_p must be a probability", "");
}

bool shares_no_memory(const Tensor& a, const Tensor& b) {
  const auto span = [](const Tensor& t) {
    int64_t last = t.numel() ? 1 : 0;
    for (int64_t i = 0; t.numel() && i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    return std::pair(begin, begin + last * t.element_size());
  };
  const auto [a_begin, a_end] = span(a);
  const auto [b_begin, b_end] = span(b);
  return a_end <= b_begin || b_end <= a_begin;
}

// What lies in one buffer, one beside the other, Python looks at more closely.
void refuse_overlap(const Call& c, const Tensor& out) {
  static const auto look = handle<Overlap>("fagen::refuse_overlap");
  const bool apart =
      out.is_non_overlapping_and_dense() && c.all_tensors([&out](const Tensor& t) { return shares_no_memory(out, t); });
  if (!apart) call_op(look, c, out);
}

// The kernel's functions, or none where PyTorch shall compute.
Entry entry_for(const Call& c, const Wanted& wanted) {
  refuse_numbers(c);
  if (c.scale && !(*c.scale >= kLeast)) return {};  // the kernels take the maximum before they scale
  if (c.q.dim() == 4 && c.k.dim() == 4 && std::max(c.q.size(c.row()), c.k.size(c.row())) > kLongest) return {};
  return find(c, wanted);
}

// ---- launching ------------------------------------------------------------------------------------------------------

fagen_tensor tensor_of(const Tensor& t, int64_t batch, int64_t i, int64_t j) {
  return {const_cast<void*>(t.const_data_ptr()), {batch, i, j}};
}

// Strides of batch, row and head.
fagen_tensor rows_of(const Tensor& t, const Call& c) {
  return tensor_of(t, t.stride(0), t.stride(c.row()), t.stride(c.head()));
}

// What the params of all ops have: the mask, the slopes, the sizes, the numbers, dropout.
template <class Params>
void put_problem(Params& p, const Call& c) {
  if (c.intervals) {
    const Tensor& t = *c.intervals;
    p.intervals = tensor_of(t, t.size(0) > 1 ? t.stride(0) : 0, t.stride(1), t.stride(2));
    p.mask_heads = static_cast<int32_t>(t.size(1));
  }
  if (c.alibi_slopes) {
    const Tensor& t = *c.alibi_slopes;
    p.alibi_slopes = tensor_of(t, t.dim() == 2 && t.size(0) > 1 ? t.stride(0) : 0, 0, 0);
  }
  p.batch = static_cast<int32_t>(c.q.size(0));
  p.seqlen_q = static_cast<int32_t>(c.q.size(c.row()));
  p.heads = static_cast<int32_t>(c.q.size(c.head()));
  p.seqlen_k = static_cast<int32_t>(c.k.size(c.row()));
  p.kv_heads = static_cast<int32_t>(c.k.size(c.head()));
  p.head_dim = static_cast<int32_t>(c.q.size(3));
  p.head_dim_v = static_cast<int32_t>(c.v.size(3));
  // a wider band shows no more, and its sum with a row would leave 32 bits
  p.window_left = static_cast<int32_t>(std::min<int64_t>(c.window_left, p.seqlen_k));
  p.window_right = static_cast<int32_t>(std::min<int64_t>(c.window_right, p.seqlen_q));
  p.scale = static_cast<float>(c.scale ? *c.scale : 1.0 / std::sqrt(static_cast<double>(c.q.size(3))));
  p.softcap = static_cast<float>(c.softcap);
  if (c.dropout > 0) {
    p.dropout = static_cast<float>(c.dropout);
    p.rng = static_cast<const uint64_t*>(c.rng->const_data_ptr());
  }
}

void* current_stream(const at::Device& device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

template <class Params>
void launch(const Entry& entry, const Call& c, Params& p) {
  const bool gpu = c.q.is_cuda();
  const c10::OptionalDeviceGuard guard(gpu ? std::optional<at::Device>(c.q.device()) : std::nullopt);
  Tensor workspace;
  if (const uint64_t need = entry.workspace_bytes(&p)) {
    workspace = at::empty({static_cast<int64_t>(need) + kWorkspaceAlignment}, c.q.options().dtype(at::kByte));
    const auto start = reinterpret_cast<uintptr_t>(workspace.data_ptr());
    p.workspace =
        reinterpret_cast<void*>((start + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment);
  }
  const int status = entry.launch(&p, gpu ? current_stream(c.q.device()) : nullptr);
  if (status != 0) {
    static const auto fail = handle<void(c10::string_view, c10::string_view)>("fagen::fail");
    fail.call("a kernel could not run", entry.error(status));
  }
}

}  // namespace fagen
