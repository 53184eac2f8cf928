"""`fagen.attention`: the way of a call to a kernel or to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch

from fagen.dispatch.resolve import resolve
from fagen.ops.attention import arguments, fallback
from fagen.ops.attention.arguments import Window
from fagen.ops.attention.call import _refusal
from fagen.runtime import binding

_fast: Callable[..., Any] | None = None  # the C++ road, once it is loaded
_fast_sdpa: Callable[..., Any] | None = None


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: str = ..., causal: bool = ..., window: Window = ...,
    intervals: torch.Tensor | None = ..., softcap: float = ..., alibi_slopes: torch.Tensor | None = ...,
    scale: float | None = ..., return_lse: Literal[False] = ..., out: torch.Tensor | None = ...,
) -> torch.Tensor: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: str = ..., causal: bool = ..., window: Window = ...,
    intervals: torch.Tensor | None = ..., softcap: float = ..., alibi_slopes: torch.Tensor | None = ...,
    scale: float | None = ..., return_lse: Literal[True], out: torch.Tensor | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: str = ..., causal: bool = ..., window: Window = ...,
    intervals: torch.Tensor | None = ..., softcap: float = ..., alibi_slopes: torch.Tensor | None = ...,
    scale: float | None = ..., return_lse: bool, out: torch.Tensor | None = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str = "bshd",
    causal: bool = False,
    window: Window = (None, None),
    intervals: torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v, by the fastest kernel known for the problem.

    q is (batch, seqlen_q, heads, d), k (batch, seqlen_k, kv_heads, d), v (batch, seqlen_k, kv_heads, dv); with
    layout="bhsd" heads come before rows. Any strides with a contiguous last dimension; heads is a multiple of
    kv_heads. fp16, bf16, float32 and float64; what no kernel of ours serves is computed by PyTorch, with a warning.

    causal        row i sees key j where j <= i + seqlen_k - seqlen_q (aligned bottom-right)
    window        (left, right): keys visible on either side of that diagonal; None for no bound
    intervals     int32 (batch or 1, 1 or kv_heads, seqlen_k, 1, 2 or 4): rows masked out per key, see `fagen.masks`
    softcap       s -> softcap * tanh(s / softcap); 0 for none
    alibi_slopes  float32 (heads) or (batch, heads): s -> s - slope * distance from the diagonal
    scale         of q k^T; 1 / sqrt(d) if not given
    return_lse    (out, lse): the natural log of the sum of exponentials, float32 (batch, heads, seqlen_q)
    out           where to put the result; it may share memory with no input

    Derivatives, forward and reverse, are PyTorch's. A row that sees no key gives 0, and -inf in lse.
    """
    if not torch.compiler.is_compiling() and _fast is not None:
        answer = _fast(q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, return_lse, out)
        if answer is not None:
            return answer
    return _attention(q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, return_lse, out)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    causal: bool,
    window: Window,
    intervals: torch.Tensor | None,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    scale: float | None,
    return_lse: bool,
    out: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Every call that is not of the usual kind, or the first; also what torch.compile traces."""
    return_lse = arguments.flag("return_lse", return_lse)
    causal, window, softcap, scale = arguments.check(
        q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, out
    )
    options: dict[str, Any] = {
        "layout": layout, "causal": causal, "window": window, "intervals": intervals, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "scale": scale,
    }  # fmt: skip
    reason = _refusal(q, k, v, alibi_slopes, scale)
    if reason:
        fallback.warn(reason)
    if torch.compiler.is_compiling():
        ready = _ops_registered()
    else:
        ready = _ops_ready() or (not reason and not _plain(q, k, v, intervals, alibi_slopes, out) and _ops_registered())
    if reason or not ready:
        return _without_ops(q, k, v, options, return_lse, out, reason)
    args = (q, k, v, intervals, alibi_slopes, layout == "bhsd", causal, *window, softcap, scale)
    if out is not None:
        lse = torch.ops.fagen.forward_out(*args, return_lse, out)
        return (out, lse) if return_lse else out
    if return_lse:
        return torch.ops.fagen.forward_lse(*args)
    return torch.ops.fagen.forward(*args)


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


def _plain(*tensors: torch.Tensor | None) -> bool:
    """Whether a kernel may be handed their addresses: no subclass, mode or transform that wants to see an op."""
    if not all(_has_memory(t) for t in tensors if t is not None):
        return False
    stacks = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    return stacks == 0 and torch._C._functorch.peek_interpreter_stack() is None


def _without_ops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any], return_lse: bool, out: Any, reason: str
) -> Any:
    """The C++ ops are not there yet, or cannot be asked: a kernel is called through ctypes, else PyTorch computes."""
    tensors = {"q": q, "k": k, "v": v, "intervals": options["intervals"], "alibi_slopes": options["alibi_slopes"]}
    plain = not torch.compiler.is_compiling() and all(_has_memory(t) for t in (*tensors.values(), out) if t is not None)
    if plain and out is not None:
        arguments.refuse_overlap(out, **tensors)
    found = resolve(q, k, v, out=out, return_lse=return_lse, **options) if plain and not reason else None
    if plain and not reason:
        binding.start()  # after the kernel, which this call waited for
    if found is None:
        value, lse = fallback.attend(q, k, v, want_lse=return_lse, **options)
        value = value if out is None else out.copy_(value)
        return (value, lse) if return_lse else value
    layout = options["layout"]
    row, head = (1, 2) if layout == "bshd" else (2, 1)
    result = q.new_empty((*q.shape[:3], v.shape[3])) if out is None else out
    rows_lse = q.new_empty((q.shape[0], q.shape[head], q.shape[row]), dtype=torch.float32) if return_lse else None
    names = ("intervals", "alibi_slopes", "window", "scale", "softcap")
    if out is not None:
        torch.autograd.graph.increment_version(out)
    found.launch(q, k, v, result, rows_lse, layout=layout, **{name: options[name] for name in names})
    return (result, rows_lse) if return_lse else result


def _has_memory(t: torch.Tensor) -> bool:
    """Not one of torch.func's, of a tracer's or of a subclass, which a kernel cannot be handed through ctypes."""
    functional = torch._C._functorch.is_functorch_wrapped_tensor(t)
    return type(t) in (torch.Tensor, torch.nn.Parameter) and not functional and not t.is_neg()
