"""The forward op on fp8 numbers (e4m3): softmax(scale * q k^T) v of what q, k and v stand for."""

from __future__ import annotations

from fagen.ops.attention import forward, size_point
from fagen.ops.attention.flags import of as forward_flags
from fagen.ops.attention.fp8_problem import Fp8Problem
from fagen.ops.base import Calls, Op

__all__ = ["OP", "Fp8Problem"]


def _calls() -> Calls:
    from fagen.ops.attention.fp8_calls import CALLS

    return CALLS


OP = Op(
    name="forward_fp8",
    title="attention forward on fp8 numbers",
    problem=Fp8Problem,
    header="fagen/abi/forward_fp8.h",
    constants=forward.OP.constants,
    features=size_point.features,
    weights=size_point.WEIGHTS,
    flags=lambda p: ["--op", "forward_fp8", *forward_flags(p)],
    torch_serves=lambda p: False,
    length="seqlen_q",
    symbols=forward.SYMBOLS,
    enums=forward.ENUMS,
    calls=_calls,
)
