"""What the C++ ops of csrc/ ask of Python: which kernel serves a call, PyTorch's answer, the words of an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fagen.errors import InvalidArgument, LaunchError
from fagen.ops.attention import arguments, fallback, gradients
from fagen.ops.attention.backward_call import BackwardCall
from fagen.ops.attention.call import AttentionCall, OpArguments

_SHARED = len(OpArguments._fields)  # arguments that all ops begin with; an op's own follow

_decide: Callable[[AttentionCall], list[int]]  # `answer_with` sets them
_decide_backward: Callable[[AttentionCall], list[int]]
_build_ahead: Callable[[AttentionCall, bool], None]  # of a call that is traced, or of its gradients
_libraries: list[Any] = []  # torch unregisters what is collected


def answer_with(
    decide: Callable[[AttentionCall], list[int]], decide_backward: Callable[[AttentionCall], list[int]],
    build_ahead: Callable[[AttentionCall, bool], None],
) -> None:  # fmt: skip
    """Hand over what decides a call that the C++ table does not know, or its gradients, and plans its kind; and what
    begins to compile the kernel of a traced call."""
    global _decide, _decide_backward, _build_ahead
    _decide, _decide_backward, _build_ahead = decide, decide_backward, build_ahead


def register() -> None:
    library = torch.library.Library("fagen", "IMPL")
    library.impl("resolve", _resolve, "CompositeExplicitAutograd")
    library.impl("resolve_backward", _resolve_backward, "CompositeExplicitAutograd")
    library.impl("fallback", _fallback, "CompositeImplicitAutograd")
    library.impl("fallback_backward", _fallback_backward, "CompositeExplicitAutograd")
    library.impl("fail", _fail, "CompositeExplicitAutograd")
    library.impl("refuse", _refuse, "CompositeExplicitAutograd")
    library.impl("refuse_overlap", _refuse_overlap, "CompositeExplicitAutograd")
    _libraries.append(library)
    fakes = {"forward": _fake, "forward_lse": _fake_lse, "forward_out": _fake_out, "backward": _fake_backward}
    for name, fake in fakes.items():
        torch.library.register_fake(f"fagen::{name}", fake)


# ---- what C++ asks --------------------------------------------------------------------------------------------------


def _resolve(*args: Any) -> list[int]:
    out, want_lse = args[_SHARED:]
    return _decide(AttentionCall.of_op(OpArguments(*args[:_SHARED]), out=out, want_lse=want_lse))


def _resolve_backward(*args: Any) -> list[int]:
    return _decide_backward(AttentionCall.of_op(OpArguments(*args), want_lse=False))


def _fallback(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (want_lse,) = args[_SHARED:]
    return fallback.attend(AttentionCall.trusting(OpArguments(*args[:_SHARED]), want_lse=want_lse))


def _fallback_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    out, lse, dout, dlse = args[_SHARED:]
    call = AttentionCall.trusting(OpArguments(*args[:_SHARED]), want_lse=dlse is not None)
    if call.dropout:
        made = gradients.by_rows(BackwardCall.after(call, out, lse, dout, dlse))
    else:
        made = fallback.gradients(call, dout, dlse)
    return tuple(_laid_out_like(room, t) for room, t in zip(_rooms(args), made, strict=True))


def _laid_out_like(room: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The strides that a tracer was told of."""
    return t if t.stride() == room.stride() else room.copy_(t)


def _refuse_overlap(*args: Any) -> None:
    (out,) = args[_SHARED:]
    arguments.refuse_overlap(out, OpArguments(*args[:_SHARED]).tensors())


def _refuse(what: str, numbers: str) -> None:
    raise InvalidArgument(what, numbers)


def _fail(what: str, numbers: str) -> None:
    raise LaunchError(what, numbers)


# ---- what a tracer sees ---------------------------------------------------------------------------------------------


def _traced(args: tuple[Any, ...], *, gradients: bool = False) -> AttentionCall:
    """The call of an op that a tracer looks at. Its kernel is compiled while the rest of the graph is."""
    call = AttentionCall.trusting(OpArguments(*args[:_SHARED]), want_lse=True)
    _build_ahead(call, gradients)
    return call


def _fakes(args: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    """Room for all outputs of an op."""
    return _traced(args).new_outputs()


def _fake(*args: Any) -> torch.Tensor:
    return _fakes(args)["out"]


def _fake_lse(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    made = _fakes(args)
    return made["out"], made["lse"]


def _fake_out(*args: Any) -> torch.Tensor:
    want_lse, out = args[_SHARED:]
    return _fakes(args)["lse"] if want_lse else out.new_empty((0,), dtype=torch.float32)


def _fake_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    _traced(args, gradients=True)
    return _rooms(args)


def _rooms(args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    q, k, v, *_ = args
    return tuple(torch.empty_like(t) for t in (q, k, v))
