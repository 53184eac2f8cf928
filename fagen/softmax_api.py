"""`fagen.softmax` and `fagen.log_softmax`: the way of a call to a kernel or to PyTorch, and their ops of torch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from fagen.dispatch import known_softmax, resolve
from fagen.errors import InvalidArgument, InvalidType
from fagen.notices import warn_fallback
from fagen.ops.attention import derivatives
from fagen.ops.softmax.call import DTYPES, SoftmaxCall, fold, too_large
from fagen.ops.softmax.calls import by_torch
from fagen.ops.softmax.stats import dimension
from fagen.schema import shown
from fagen.target import target_of

_libraries: list[Any] = []  # torch unregisters what is collected


def softmax(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """exp(x) / sum exp(x) along `dim`, as torch.softmax, by the fastest kernel known for the problem.

    Any strides; fastest where `dim` is the last dimension and contiguous, or another one of a contiguous tensor.
    `dtype` casts x on its way in; 16 bits become float32 in the kernel, without a copy. Rows of -inf, +inf and NaN give
    what PyTorch gives. fp16, bf16 and float32; what no kernel of ours serves is computed by PyTorch, with a warning.

    Differentiable any number of times; the first derivative is a kernel of ours.
    """
    return _softmax(x, dim, dtype, False)


def log_softmax(x: torch.Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The logarithm of `fagen.softmax`, x - max x - log sum exp(x - max x), as torch.log_softmax."""
    return _softmax(x, dim, dtype, True)


def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None, log: bool) -> torch.Tensor:
    known = None if torch.compiler.is_compiling() else known_softmax.find(x, dim, dtype, log)
    if known is not None:
        return known(x)
    axis = dimension(x, dim)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise InvalidType(f"dtype must be a floating dtype of torch, not {shown(dtype)}")
    if dtype is None and not (x.is_floating_point() or x.is_complex()):
        raise InvalidType(f"a softmax of {x.dtype} is not defined", "", "give dtype=torch.float32")
    out_dtype = dtype or x.dtype
    reason = _refusal(x, out_dtype)
    if reason:
        warn_fallback(reason)
        return (torch.log_softmax if log else torch.softmax)(x, axis, dtype=dtype)
    if x.dtype != out_dtype and not _widens(x.dtype, out_dtype):
        x = x.to(out_dtype)
    made: torch.Tensor = torch.ops.fagen.softmax(x, axis, log, out_dtype)
    return made


def _widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    return wide == torch.float32 and narrow in DTYPES


def _refusal(x: torch.Tensor, out_dtype: torch.dtype) -> str:
    """Why PyTorch must compute the call; empty if an op of ours may."""
    if out_dtype not in DTYPES or x.is_complex():
        return f"no softmax kernel gives {out_dtype}"
    if x.layout != torch.strided or x.is_nested:
        return "no softmax kernel takes sparse or nested tensors"
    if x.device.type not in ("cpu", "cuda"):
        return f"no softmax kernel runs on device {x.device.type}"
    if torch.compiler.is_compiling():
        return ""
    if derivatives.has_tangent(x):
        return "forward-mode derivatives of a softmax have no kernel"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "transforms of torch.func see no softmax kernel"
    return ""


# ---- the ops --------------------------------------------------------------------------------------------------------


def _register() -> None:
    library = torch.library.Library("fagen", "FRAGMENT")
    how = "int dim, bool log, ScalarType dtype"
    library.define(f"softmax(Tensor x, {how}) -> Tensor")
    library.define(f"softmax_backward(Tensor dout, Tensor y, {how}) -> Tensor")
    library.impl("softmax", _forward, "CompositeExplicitAutograd")
    library.impl("softmax_backward", _backward, "CompositeExplicitAutograd")
    torch.library.register_fake("fagen::softmax", _fake_forward, lib=library)
    torch.library.register_fake("fagen::softmax_backward", _fake_backward, lib=library)
    torch.library.register_autograd("fagen::softmax", _differentiate, setup_context=_save, lib=library)
    torch.library.register_autograd(
        "fagen::softmax_backward", _differentiate_again, setup_context=_save_again, lib=library
    )
    _libraries.append(library)


def _forward(x: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    """Anybody may call an op with anything: what it takes is checked again."""
    dim = dimension(x, dim)
    if x.dtype not in DTYPES or (dtype != x.dtype and not _widens(x.dtype, dtype)):
        raise InvalidArgument(f"the op takes fp16, bf16 and float32, or widens to it: not {x.dtype} to {dtype}")
    return _run(x, None, dim, log, dtype)


def _backward(dout: torch.Tensor, y: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    dim = dimension(y, dim)
    if y.dtype not in DTYPES or (dtype != y.dtype and not _widens(dtype, y.dtype)):
        raise InvalidArgument(f"the op takes fp16, bf16 and float32, or narrows from it: not {y.dtype} to {dtype}")
    if (dout.shape, dout.dtype, dout.device) != (y.shape, y.dtype, y.device):
        have = f"{dout.dtype} {tuple(dout.shape)} on {dout.device}, {y.dtype} {tuple(y.shape)} on {y.device}"
        raise InvalidArgument("a gradient must be like what it is of", have)
    return _run(y, dout, dim, log, dtype)


def _run(x: torch.Tensor, dout: torch.Tensor | None, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    known = known_softmax.served(x, dim, dtype, log, dout)
    if known is not None:
        return known(x, dout)
    out, given, begun = torch.empty(x.shape, dtype=dtype, device=x.device), dout, resolve.epoch()
    if out.numel() == 0:
        return out
    folded, along = fold(x, dim)
    if dout is not None:
        gradient, _ = fold(dout, dim)
        if gradient.shape != folded.shape:  # they lie differently
            folded, gradient = fold(x.contiguous(), dim)[0], fold(dout.contiguous(), dim)[0]
        dout = gradient
    call = SoftmaxCall(folded, dtype, along, log, dout)
    if not _launch(call, out.view(folded.shape)):
        return by_torch(call).reshape(x.shape).contiguous()
    known_softmax.remember(x, dim, given, call, begun)
    return out


def _launch(call: SoftmaxCall, out: torch.Tensor) -> bool:
    """Whether a kernel of ours served the call."""
    target, reason = target_of(call.x.device), too_large(call.x)
    found = None
    if target is None or reason:
        warn_fallback(f"no softmax kernel takes the call: {reason or call.x.device}")
    else:
        with torch.cuda.device(call.x.device) if call.x.is_cuda else nullcontext():
            found = resolve.kernel_for(call.problem, target)
    if found is not None:
        found.launch(call, {"out": out})
    return found is not None


def _fake_forward(x: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _fake_backward(dout: torch.Tensor, y: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(y.shape, dtype=dtype, device=y.device)


# ---- autograd -------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.dim, ctx.log, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output)


def _differentiate(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return torch.ops.fagen.softmax_backward(dout, y, ctx.dim, ctx.log, ctx.dtype), None, None, None


def _save_again(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    dout, y, ctx.dim, ctx.log, _ = inputs
    ctx.save_for_backward(dout, y)


def _differentiate_again(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Of dx = y (g - sum y g), or of dx = g - exp(y) sum g, by PyTorch: rare, and differentiable in turn."""
    g, y = ctx.saved_tensors
    dx = dx.to(y.dtype)

    def total(t: torch.Tensor) -> torch.Tensor:
        return t.sum(ctx.dim, keepdim=True)

    if ctx.log:
        weight = y.exp()
        return dx - total(dx * weight), -dx * weight * total(g), None, None, None
    seen = total(dx * y)
    return y * (dx - seen), dx * (g - total(g * y)) - g * seen, None, None, None


_register()  # at once: torch.compile may trace the first call
