"""The forward op on fp8 numbers (e4m3): softmax(scale * q k^T) v of what q, k and v stand for."""

from __future__ import annotations

from fagen.ops.attention import forward, size_point
from fagen.ops.attention.flags import of as forward_flags
from fagen.ops.attention.fp8_problem import Fp8Problem
from fagen.ops.base import Calls, Constant, Op

__all__ = ["OP", "Fp8Problem"]


def _calls() -> Calls:
    from fagen.ops.attention.fp8_calls import CALLS

    return CALLS


def _constants(problem: Fp8Problem) -> list[Constant]:
    rows = "rows of q, and of k, that have a descale of their own; 0: none"
    return [*forward.OP.constants(problem), ("int", "kScaleBlock", str(problem.scale_block), rows)]


def _flags(problem: Fp8Problem) -> list[str]:
    words = ["--op", "forward_fp8", *forward_flags(problem)]
    return words + (["--scale-block", str(problem.scale_block)] if problem.scale_block else [])


OP = Op(
    name="forward_fp8",
    title="attention forward on fp8 numbers",
    problem=Fp8Problem,
    header="fagen/abi/forward_fp8.h",
    constants=_constants,
    features=size_point.features,
    weights=size_point.WEIGHTS,
    flags=_flags,
    torch_serves=lambda p: False,
    length="seqlen_q",
    symbols=forward.SYMBOLS,
    enums=forward.ENUMS,
    calls=_calls,
)
