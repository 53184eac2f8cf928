"""The ops of attention with dropout: `forward_dropout` and its gradient `backward_dropout`.

Seed and offset are an argument, so the ops are functions of their arguments: what a tracer may run again, or a graph
replay, gives the same mask. Kernels are called through ctypes; where none serves, PyTorch computes with the same mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_type_hints

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments, derivatives, fallback, gradients
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.backward_call import BackwardCall
from fagen.ops.attention.call import AttentionCall, OpArguments

if TYPE_CHECKING:
    from fagen.runtime.kernel import Kernel

_SHARED = len(OpArguments._fields)  # arguments that both ops begin with; then the rate, and seed and offset
_SCHEMA_TYPES = {
    torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", bool: "bool", int: "int", float: "float",
    float | None: "float?",
}  # fmt: skip

_kernel_of: Callable[[AttentionCall], Kernel | None]  # `answer_with` sets them
_build_ahead: Callable[[AttentionCall, bool], None]
_libraries: list[Any] = []  # torch unregisters what is collected


def answer_with(
    kernel_of: Callable[[AttentionCall], Kernel | None], build_ahead: Callable[[AttentionCall, bool], None]
) -> None:
    """Hand over what finds the kernel of a call, forward or backward, None where PyTorch computes; and what begins to
    compile the one of a traced call, or of its gradients."""
    global _kernel_of, _build_ahead
    _kernel_of, _build_ahead = kernel_of, build_ahead


def attend(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a call whose seed and offset are drawn, differentiable in q, k and v."""
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.fagen.forward_dropout(
        *call.op_arguments(), call.dropout, call.rng
    )
    return result


def _register() -> None:
    library = torch.library.Library("fagen", "FRAGMENT")
    shared = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(OpArguments).items())
    shared += ", float dropout_p, Tensor rng"
    saved = "Tensor out, Tensor lse, Tensor dout, Tensor? dlse"
    library.define(f"forward_dropout({shared}) -> (Tensor, Tensor)")
    library.define(f"backward_dropout({shared}, {saved}) -> (Tensor, Tensor, Tensor)")
    ops: dict[str, tuple[Callable[..., Any], ...]] = {
        "forward_dropout": (_forward, _fake_forward, _differentiate, _save),
        "backward_dropout": (_backward, _fake_backward, _refuse_second, _save_nothing),
    }
    for name, (run, fake, gradient, save) in ops.items():
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fagen::{name}", fake, lib=library)
        torch.library.register_autograd(f"fagen::{name}", gradient, setup_context=save, lib=library)
    _libraries.append(library)


# ---- the ops --------------------------------------------------------------------------------------------------------


def _call(args: tuple[Any, ...]) -> AttentionCall:
    """Validated: anybody may call an op with anything."""
    call = AttentionCall.of_op(OpArguments(*args[:_SHARED]), want_lse=True)
    rate, rng = args[_SHARED : _SHARED + 2]
    call = dataclasses.replace(call, dropout=arguments.probability("dropout_p", rate), rng=rng)
    call.check_dropout()
    return call


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _call(args)
    found = _kernel_of(call)
    if found is None:
        return fallback.attend(call)
    outputs = call.new_outputs()
    found.launch(call, outputs)
    return outputs["out"], outputs["lse"]


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    out, lse, dout, dlse = args[_SHARED + 2 :]
    call = BackwardCall.after(
        _call(args), _readable(out), lse.contiguous(), _readable(dout), None if dlse is None else dlse.contiguous()
    )
    found = _kernel_of(call)
    if found is None:
        return gradients.by_rows(call)
    outputs = call.new_outputs()
    found.launch(call, outputs)
    return tuple(outputs.values())


def _readable(t: torch.Tensor) -> torch.Tensor:
    """As an aligned kernel reads it; a gradient of a sum is expanded."""
    return t if is_aligned(t) else t.contiguous()


def _fake_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    made = _traced(args, gradients=False).new_outputs()
    return made["out"], made["lse"]


def _traced(args: tuple[Any, ...], *, gradients: bool) -> AttentionCall:
    """The call of an op that a tracer looks at. Its kernel is compiled while the rest of the graph is."""
    call = AttentionCall.trusting(OpArguments(*args[:_SHARED]), want_lse=True)
    _build_ahead(dataclasses.replace(call, dropout=args[_SHARED]), gradients)
    return call


def _fake_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    _traced(args, gradients=True)
    q, k, v, *_ = args
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


# ---- autograd -------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    a, (rate, rng) = OpArguments(*inputs[:_SHARED]), inputs[_SHARED:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.q, a.k, a.v, a.intervals, a.alibi_slopes, rng, *output)
    ctx.rest = (*a[5:-1], derivatives.must_repeat(a.deterministic), rate)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *tensors, rng, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    made = torch.ops.fagen.backward_dropout(*tensors, *ctx.rest, rng, out, lse, dout, dlse)
    return (*made, *[None] * (_SHARED + 2 - len(made)))


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """A gradient of the gradient has no kernel."""


def _refuse_second(ctx: Any, *gradients: torch.Tensor | None) -> None:
    raise InvalidArgument("attention can be differentiated once", "its gradient has no derivative")


_register()  # at once: torch.compile may trace the first call
