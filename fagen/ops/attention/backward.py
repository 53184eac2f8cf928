"""The backward op: the gradients of q, k and v from those of O and the LSE."""

from __future__ import annotations

from fagen.ops.attention import forward, size_point, work
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.flags import of as forward_flags
from fagen.ops.base import Calls, Op

__all__ = ["OP", "BackwardProblem"]


def _flags(p: BackwardProblem) -> list[str]:
    return ["--op", "backward", *forward_flags(p), *(["--deterministic"] if p.deterministic else [])]


def _torch_serves(p: BackwardProblem) -> bool:
    """Never in the place of a kernel of ours: it would compute the call as a whole, forward as well."""
    return False


def _calls() -> Calls:
    from fagen.ops.attention.backward_calls import CALLS

    return CALLS


OP = Op(
    name="backward",
    title="attention backward",
    problem=BackwardProblem,
    header="fagen/abi/backward.h",
    constants=lambda p: [*forward.OP.constants(p), ("bool", "kDeterministic", str(p.deterministic).lower(), "bitwise")],
    features=size_point.features,
    weights=size_point.WEIGHTS,
    flags=_flags,
    torch_serves=_torch_serves,
    length="seqlen_q",
    least_bytes=work.least_bytes_backward,
    symbols=forward.OP.symbols,
    enums=forward.OP.enums,
    calls=_calls,
    example_names=forward.OP.example_names,
    example="example/backward.j2",
)
