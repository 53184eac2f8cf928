"""What the C++ ops of csrc/ ask of Python: which kernel serves a call, PyTorch's answer, the words of an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fagen.errors import InvalidArgument, LaunchError
from fagen.ops.attention import arguments, fallback
from fagen.ops.attention.call import AttentionCall, OpArguments

_SHARED = len(OpArguments._fields)  # arguments that all ops begin with; an op's own follow

_decide: Callable[[AttentionCall], list[int]]  # `answer_with` sets it
_libraries: list[Any] = []  # torch unregisters what is collected


def answer_with(decide: Callable[[AttentionCall], list[int]]) -> None:
    """Hand over the function that decides a call the C++ table does not know, and plans other sizes of its kind."""
    global _decide
    _decide = decide


def register() -> None:
    library = torch.library.Library("fagen", "IMPL")
    library.impl("resolve", _resolve, "CompositeExplicitAutograd")
    library.impl("fallback", _fallback, "CompositeImplicitAutograd")
    library.impl("fail", _fail, "CompositeExplicitAutograd")
    library.impl("refuse", _refuse, "CompositeExplicitAutograd")
    library.impl("refuse_overlap", _refuse_overlap, "CompositeExplicitAutograd")
    _libraries.append(library)
    for name, fake in (("forward", _fake), ("forward_lse", _fake_lse), ("forward_out", _fake_out)):
        torch.library.register_fake(f"fagen::{name}", fake)


# ---- what C++ asks --------------------------------------------------------------------------------------------------


def _resolve(*args: Any) -> list[int]:
    out, want_lse = args[_SHARED:]
    return _decide(AttentionCall.of_op(OpArguments(*args[:_SHARED]), out=out, want_lse=want_lse))


def _fallback(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (want_lse,) = args[_SHARED:]
    return fallback.attend(AttentionCall.trusting(OpArguments(*args[:_SHARED]), want_lse=want_lse))


def _refuse_overlap(*args: Any) -> None:
    (out,) = args[_SHARED:]
    arguments.refuse_overlap(out, OpArguments(*args[:_SHARED]).tensors())


def _refuse(what: str, numbers: str) -> None:
    raise InvalidArgument(what, numbers)


def _fail(what: str, numbers: str) -> None:
    raise LaunchError(what, numbers)


# ---- what a tracer sees ---------------------------------------------------------------------------------------------


def _fakes(args: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    """Room for all outputs of an op."""
    return AttentionCall.trusting(OpArguments(*args[:_SHARED]), want_lse=True).new_outputs()


def _fake(*args: Any) -> torch.Tensor:
    return _fakes(args)["out"]


def _fake_lse(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    made = _fakes(args)
    return made["out"], made["lse"]


def _fake_out(*args: Any) -> torch.Tensor:
    want_lse, out = args[_SHARED:]
    return _fakes(args)["lse"] if want_lse else out.new_empty((0,), dtype=torch.float32)
