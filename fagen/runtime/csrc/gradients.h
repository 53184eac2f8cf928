// Gradients: the op `backward`, and the node of autograd that calls it.
//
// A call whose gradients a kernel of ours serves runs forward_lse and keeps q, k, v, O and the LSE. Every other one is
// computed by PyTorch, differentiably: forward mode, torch.func, gradients of slopes, problems without such a kernel.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <ATen/Context.h>
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "fagen/abi/backward.h"
#include "launch.h"

namespace fagen {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of q, k and v
// out, lse, their gradients (that of lse may be none)
using Backward = Signature<Gradients, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&>;

// ---- the op ---------------------------------------------------------------------------------------------------------

// A tensor as a kernel can read it: its last dimension contiguous, its rows aligned if the kernel counts on that.
Tensor readable(const Tensor& t, bool aligned) {
  const bool contiguous = t.stride(3) == 1 || t.size(3) == 1;
  return contiguous && (!aligned || rows_aligned(t)) ? t : t.contiguous();
}

// Room for a gradient, in the order of its tensor's dimensions in memory.
Tensor room_like(const Tensor& t) {
  const Tensor room = at::empty_like(t);
  return room.stride(3) == 1 || room.size(3) == 1 ? room : at::empty(t.sizes(), t.options());
}

// The op may be called by anybody, with anything.
void check_saved(const Call& c, const Tensor& out, const Tensor& lse, const Tensor& dout, const MaybeTensor& dlse) {
  static const auto refuse = handle<void(c10::string_view, c10::string_view)>("fagen::refuse");
  const std::array<int64_t, 4> like_out = {c.q.size(0), c.q.size(1), c.q.size(2), c.v.size(3)};
  const std::array<int64_t, 3> like_lse = {c.q.size(0), c.q.size(c.head()), c.q.size(c.row())};
  for (const Tensor* t : {&out, &dout}) {
    const bool fits =
        t->sizes() == at::IntArrayRef(like_out) && t->dtype() == c.q.dtype() && t->device() == c.q.device();
    if (!fits) refuse.call("out and its gradient must have the shape, dtype and device of the result", "");
  }
  for (const Tensor* t : {&lse, dlse ? &*dlse : &lse}) {
    const bool fits =
        t->sizes() == at::IntArrayRef(like_lse) && t->dtype() == at::kFloat && t->device() == c.q.device();
    if (!fits) refuse.call("lse and its gradient must be float32 (batch, heads, seqlen_q)", "");
  }
}

// PyTorch computes the output once more and differentiates that, in a graph of its own: the keys of autograd, which lie
// above this op and are switched off below it, must be on again.
Gradients gradients_by_torch(const Call& c, const Tensor& out, const Tensor& lse, const Tensor& dout,
                             const MaybeTensor& dlse) {
  static const auto op = handle<Backward>("fagen::fallback_backward");
  const at::NoGradGuard result_has_no_graph;
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const c10::impl::ForceDispatchKeyGuard autograd_is_on(
      keys.included_, keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  return call_op(op, c, out, lse, dout, dlse);
}

Gradients backward(const Call& c, const Tensor& out, const Tensor& lse, const Tensor& dout, const MaybeTensor& dlse) {
  const Entry entry = entry_for(c, {.gradients = true});
  if (!entry.launch) return gradients_by_torch(c, out, lse, dout, dlse);
  check_saved(c, out, lse, dout, dlse);

  const bool aligned =
      c.v.size(3) * c.v.element_size() % kAlignment == 0 && rows_aligned(c.q) && rows_aligned(c.k) && rows_aligned(c.v);
  const Tensor o = readable(out, aligned), from = readable(dout, aligned), sums = lse.contiguous();
  const Tensor of_sums = dlse ? dlse->contiguous() : Tensor();
  Tensor dq = room_like(c.q), dk = room_like(c.k), dv = room_like(c.v);

  fagen_backward_params p{};
  p.q = rows_of(c.q, c), p.k = rows_of(c.k, c), p.v = rows_of(c.v, c);
  p.o = rows_of(o, c), p.dout = rows_of(from, c);
  p.dq = rows_of(dq, c), p.dk = rows_of(dk, c), p.dv = rows_of(dv, c);
  p.lse = sums.const_data_ptr<float>();
  if (dlse) p.dlse = of_sums.const_data_ptr<float>();
  put_problem(p, c);
  launch(entry, c, p);
  return {dq, dk, dv};
}

// ---- autograd -------------------------------------------------------------------------------------------------------

bool has_tangent(const Call& c) {
  return !c.all_tensors([](const Tensor& t) { return !t._fw_grad(/*level=*/0).defined(); });
}

bool wants_gradient(const Call& c) {
  return at::GradMode::is_enabled() && !c.all_tensors([](const Tensor& t) { return !t.requires_grad(); });
}

// A tensor without memory, of a tracer: nothing of it may be asked that has no answer before the graph runs.
bool traced(const Tensor& t) { return t.key_set().has(c10::DispatchKey::Python); }

// Whether all runs must agree in every bit, as the caller or all of PyTorch was told.
bool must_repeat(const Call& c) { return c.deterministic || at::globalContext().deterministicAlgorithms(); }

// Whether a transform of torch.func is at work, which takes no node of autograd from C++: then asking raises an error.
bool in_transform() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return false;
  try {
    transforms->checkSupportsCppAutogradFunction();
    return false;
  } catch (const c10::Error&) { return true; }
}

// Whether every gradient that is wanted is one that the op `backward` computes.
bool gradients_are_ours(const Call& c) {
  if (has_tangent(c) || in_transform()) return false;
  if (c.alibi_slopes && c.alibi_slopes->requires_grad()) return false;
  if (traced(c.q)) return true;  // `backward` decides when the graph runs
  Call same = c;
  same.deterministic = must_repeat(c);
  const bool served = entry_for(same, {.gradients = true}).launch != nullptr;
  return served || c.dropout > 0;  // of which PyTorch would keep all weights
}

// Attention whose backward is the op: (out, lse).
struct Attention : torch::autograd::Function<Attention> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;

  static Tensors forward(Context* ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Call& c) {
    static const auto op = handle<ForwardLse>("fagen::forward_lse");
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, lse] = call_op(op, c);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, out, lse, c.intervals.value_or(Tensor()), c.alibi_slopes.value_or(Tensor()),
                            c.rng.value_or(Tensor())});
    ctx->saved_data["flags"] =
        std::vector<int64_t>{c.bhsd, c.causal, c.window_left, c.window_right, c.scale.has_value(), must_repeat(c)};
    ctx->saved_data["numbers"] = std::vector<double>{c.softcap, c.scale.value_or(0), c.dropout};
    return {out, lse};
  }

  static Tensors backward(Context* ctx, const Tensors& wanted) {
    static const auto op = handle<Backward>("fagen::backward");
    const Tensors saved = ctx->get_saved_variables();
    const auto flags = ctx->saved_data["flags"].toIntVector();
    const auto numbers = ctx->saved_data["numbers"].toDoubleVector();
    const auto given = [](const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; };
    const MaybeTensor intervals = given(saved[5]), slopes = given(saved[6]), rng = given(saved[7]);
    const MaybeTensor dlse = given(wanted[1]);
    const Call c{
        .q = saved[0],
        .k = saved[1],
        .v = saved[2],
        .intervals = intervals,
        .alibi_slopes = slopes,
        .bhsd = flags[0] != 0,
        .causal = flags[1] != 0,
        .window_left = flags[2],
        .window_right = flags[3],
        .softcap = numbers[0],
        .scale = flags[4] ? std::optional<double>(numbers[1]) : std::nullopt,
        .deterministic = flags[5] != 0,
        .dropout = numbers[2],
        .rng = rng,
    };
    const Tensor dout = wanted[0].defined() ? wanted[0] : at::zeros_like(saved[3]);
    auto [dq, dk, dv] = call_op(op, c, saved[3], saved[4], dout, dlse);
    return {dq, dk, dv, Tensor()};
  }
};

// A gradient of the gradient has no kernel. Asked for one, say so instead of giving zero.
struct OnlyOnce : torch::autograd::Function<OnlyOnce> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;

  static Tensors forward(Context*, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& dout,
                         const MaybeTensor& dlse, const Gradients& made) {
    return {std::get<0>(made), std::get<1>(made), std::get<2>(made)};
  }
  static Tensors backward(Context*, const Tensors&) {
    static const auto refuse = handle<void(c10::string_view, c10::string_view)>("fagen::refuse");
    refuse.call("attention can be differentiated once", "its gradient has no derivative");
    return {};
  }
};

Gradients backward_autograd(const Call& c, const Tensor& out, const Tensor& lse, const Tensor& dout,
                            const MaybeTensor& dlse) {
  static const auto op = handle<Backward>("fagen::backward");
  Gradients made;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    made = call_op(op, c, out, lse, dout, dlse);
  }
  const bool again = at::GradMode::is_enabled() && (wants_gradient(c) || dout.requires_grad());
  if (!again) return made;
  const auto once = OnlyOnce::apply(c.q, c.k, c.v, dout, dlse, made);
  return {once[0], once[1], once[2]};
}

}  // namespace fagen
