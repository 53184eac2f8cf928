"""`fagen.attention`: the way of a call to a kernel or to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch

from fagen import env
from fagen.dispatch.attention import kernel_of
from fagen.ops.attention import arguments, derivatives, fallback
from fagen.ops.attention import sinks as sink_logits
from fagen.ops.attention.arguments import Window
from fagen.ops.attention.call import AXES, AttentionCall
from fagen.runtime import binding
from fagen.runtime import sinks as sink_kernel

Descale = torch.Tensor | float | None
_FP8 = torch.float8_e4m3fn
_NO_BLOCK = 0  # compared by identity: False and 0.0, which equal it, are refused where fp8 arguments are checked

_fast: Callable[..., Any] | None = None  # the C++ road, once it is loaded
_fast_sdpa: Callable[..., Any] | None = None


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: str = ..., causal: bool = ..., window: Window = ...,
    intervals: torch.Tensor | None = ..., softcap: float = ..., alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
    out: torch.Tensor | None = ..., deterministic: bool = ..., dropout_p: float = ..., descale_q: Descale = ...,
    descale_k: Descale = ..., descale_v: Descale = ..., descale_block: int = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: str = ..., causal: bool = ..., window: Window = ...,
    intervals: torch.Tensor | None = ..., softcap: float = ..., alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ..., scale: float | None = ..., return_lse: Literal[True],
    out: torch.Tensor | None = ..., deterministic: bool = ..., dropout_p: float = ..., descale_q: Descale = ...,
    descale_k: Descale = ..., descale_v: Descale = ..., descale_block: int = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: str = ..., causal: bool = ..., window: Window = ...,
    intervals: torch.Tensor | None = ..., softcap: float = ..., alibi_slopes: torch.Tensor | None = ...,
    sinks: torch.Tensor | None = ..., scale: float | None = ..., return_lse: bool,
    out: torch.Tensor | None = ..., deterministic: bool = ..., dropout_p: float = ..., descale_q: Descale = ...,
    descale_k: Descale = ..., descale_v: Descale = ..., descale_block: int = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: str = "bshd", causal: bool = False,
    window: Window = (None, None), intervals: torch.Tensor | None = None, softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None, scale: float | None = None,
    return_lse: bool = False, out: torch.Tensor | None = None, deterministic: bool = False, dropout_p: float = 0.0,
    descale_q: Descale = None, descale_k: Descale = None, descale_v: Descale = None, descale_block: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """softmax(scale * q k^T) v, by the fastest kernel known for the problem.

    q is (batch, seqlen_q, heads, d), k (batch, seqlen_k, kv_heads, d), v (batch, seqlen_k, kv_heads, dv); with
    layout="bhsd" heads come before rows. Any strides with a contiguous last dimension; heads is a multiple of
    kv_heads. fp16, bf16, float32 and float64; what no kernel of ours serves is computed by PyTorch, with a warning.

    causal        row i sees key j where j <= i + seqlen_k - seqlen_q (aligned bottom-right)
    window        (left, right): keys visible on either side of that diagonal; None for no bound
    intervals     int32 (batch or 1, 1 or kv_heads, seqlen_k, 1, 2 or 4): rows masked out per key, see `fagen.masks`
    softcap       s -> softcap * tanh(s / softcap); 0 for none
    alibi_slopes  float32 (heads) or (batch, heads): s -> s - slope * distance from the diagonal
    sinks         (heads): a logit a head that joins the sum of its rows' softmax and has no value
    scale         of q k^T; 1 / sqrt(d) if not given
    return_lse    (out, lse): the natural log of the sum of exponentials, float32 (batch, heads, seqlen_q)
    out           where to put the result; it may share memory with no input
    deterministic gradients of the same bits in every run, as after `torch.use_deterministic_algorithms(True)`; the
                  forward kernels are so in any case
    dropout_p     the probability that a weight is dropped, rounded to 1/256; those kept are scaled up. PyTorch's
                  generator of the device decides which: the same seed drops the same, whatever kernel serves
    descale_*     with q, k and v of float8_e4m3fn, what multiplies each: a number or float32 (batch, kv_heads), as
                  `fagen.quantize_qkv` gives them. The result is bfloat16, or of the dtype of `out`
    descale_block rows of q, and of k, that have a descale of their own: (batch, heads of the tensor, blocks) of both

    Gradients of q, k and v are ours where a backward kernel serves them; all other derivatives are PyTorch's. A row
    that sees no key gives 0, and -inf in lse (or its sink).
    """
    plain = descale_q is None and descale_k is None and descale_v is None and descale_block is _NO_BLOCK
    if not plain or getattr(q, "dtype", None) is _FP8:  # what only such calls have is checked there
        from fagen import fp8_api  # as most calls do not

        return fp8_api.attention(
            q, k, v, (descale_q, descale_k, descale_v), descale_block, sinks=sinks, layout=layout, causal=causal,
            window=window, intervals=intervals, softcap=softcap, scale=scale, return_lse=return_lse, out=out,
            alibi_slopes=alibi_slopes, dropout_p=dropout_p,
        )  # fmt: skip
    if sinks is not None:
        return _with_sinks(
            sinks, q, k, v, layout, return_lse, out, causal=causal, window=window, intervals=intervals,
            softcap=softcap, alibi_slopes=alibi_slopes, scale=scale, deterministic=deterministic, dropout_p=dropout_p,
        )  # fmt: skip
    if not torch.compiler.is_compiling() and _fast is not None:
        answer = _fast(q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, return_lse, out,
                       deterministic, dropout_p)  # fmt: skip
        if answer is not None:
            return answer
    return _attention(
        AttentionCall.of(
            q, k, v, layout=layout, causal=causal, window=window, intervals=intervals, softcap=softcap,
            alibi_slopes=alibi_slopes, scale=scale, return_lse=return_lse, out=out, deterministic=deterministic,
            dropout_p=dropout_p,
        )
    )  # fmt: skip


def _with_sinks(
    sinks: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, return_lse: bool,
    out: torch.Tensor | None, **how: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The call without them, then the sinks. In float64 PyTorch computes both: an LSE is float32 here."""
    simple = out is None and isinstance(q, torch.Tensor) and not q.is_nested and q.dim() == 4 and layout in tuple(AXES)
    if simple and q.dtype != torch.float64:  # the fast road checks all else
        sink_logits.check(sinks, q.shape[AXES[layout][1]], q.device)
    else:
        call = AttentionCall.of(q, k, v, layout=layout, return_lse=return_lse, out=out, sinks=sinks, **how)
        if q.dtype == torch.float64:
            return _attention(call)
        if not torch.compiler.is_compiling() and _has_memory(call):
            call.refuse_overlap()
    want_lse = arguments.flag("return_lse", return_lse)
    value, lse = attention(q, k, v, layout=layout, return_lse=True, out=out, **how)
    value, lse = sink_kernel.apply(value, lse, sinks, layout, in_place=out is not None)
    return (value, lse) if want_lse else value


def _attention(call: AttentionCall) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Every call that is not of the usual kind, or the first; also what torch.compile traces."""
    reason = call.op_refusal
    if reason:
        fallback.warn(reason)
    if call.dropout and not reason:
        if _transformed():
            return _without_ops(call, "with dropout, torch.func differentiates PyTorch's")
        call = call.with_rng()  # here, where a tracer sees it
    if torch.compiler.is_compiling():
        ready = _ops_registered()
    else:
        ready = _ops_ready() or (not reason and _waits_for_ops(call) and _ops_registered())
    if reason or not ready:
        return _without_ops(call, reason)
    args = call.op_arguments()
    if call.out is not None:
        lse = torch.ops.fagen.forward_out(*args, call.want_lse, call.out)
        return (call.out, lse) if call.want_lse else call.out
    if call.want_lse:
        return torch.ops.fagen.forward_lse(*args)
    return torch.ops.fagen.forward(*args)


def _transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _ops_ready() -> bool:
    """Whether the ops are registered; a call does not wait until they are built."""
    return _take(binding.ready())


def _ops_registered() -> bool:
    """Whether they are after waiting for that. torch.compile runs this while it traces: a graph needs the ops."""
    return _take(binding.load())


def _take(module: Any) -> bool:
    global _fast, _fast_sdpa
    if module is not None:
        _fast, _fast_sdpa = module.attention, module.sdpa
    return module is not None


# what torch.compiler.assume_constant_result sets, without the second that importing torch._dynamo for it takes
vars(_ops_registered)["_dynamo_marked_constant"] = True


def _waits_for_ops(call: AttentionCall) -> bool:
    """Whether the ops alone will do: for tensors that no kernel may be handed, and for gradients, which ctypes does not
    give. Were those PyTorch's until the ops are built, a run would not repeat its bits."""
    if not _plain(call):
        return True
    return env.build_mode() == "wait" and derivatives.differentiated(call.q, call.k, call.v)


def ops_for_gradients() -> bool:
    """Whether the op `backward` can be called, after waiting for it where calls wait."""
    return _ops_ready() or (env.build_mode() == "wait" and _ops_registered())


def _plain(call: AttentionCall) -> bool:
    """Whether a kernel may be handed the addresses: no subclass, mode or transform that wants to see an op."""
    if not _has_memory(call):
        return False
    stacks = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return stacks == 0 and not _transformed()


def _has_memory(call: AttentionCall) -> bool:
    """No tensor of torch.func's, of a tracer's or of a subclass, which a kernel cannot be handed through ctypes."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    tensors = [*call.inputs().values(), *([] if call.out is None else [call.out])]
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) and not wrapped(t) and not t.is_neg() for t in tensors)


def _without_ops(call: AttentionCall, reason: str) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The C++ ops are not there yet, or cannot be asked: a kernel is called through ctypes, else PyTorch computes."""
    plain = not torch.compiler.is_compiling() and _has_memory(call)
    if plain:
        call.refuse_overlap()
    differentiated = derivatives.differentiated(call.q, call.k, call.v)  # which takes the ops' node of autograd
    found = kernel_of(call) if plain and not reason and not differentiated else None
    if plain and not reason:
        binding.start()  # after the kernel, which this call waited for
    if found is None:
        value, lse = fallback.attend(call)
        value = value if call.out is None else call.out.copy_(value)
        return (value, lse) if call.want_lse else value
    outputs = call.new_outputs()
    if call.out is not None:
        torch.autograd.graph.increment_version(call.out)
    found.launch(call, outputs)
    return (outputs["out"], outputs["lse"]) if call.want_lse else outputs["out"]
