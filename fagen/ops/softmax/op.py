"""The softmax op: one op for both directions.

Forward and backward are the same walk: a reduction along each row, then one function of each element and of what was
reduced. They share params, layouts, knobs and schemes, so that one family serves both; `direction` is in the static
key, and each has records of its own.
"""

from __future__ import annotations

import math

from fagen.ops.base import Calls, Constant, Op
from fagen.ops.softmax.problem import ALONG, SoftmaxProblem

_SYMBOLS = (
    "Symbols: m = max x, s = sum exp(x - m); y = exp(x - m) / s, or its logarithm x - m - log s.",
    "Gradients: dx = y (dy - sum y dy); of the logarithm dx = dy - exp(y) sum dy.",
)


def _constants(p: SoftmaxProblem) -> list[Constant]:
    return [
        ("bool", "kBackward", str(p.direction == "backward").lower(), "the gradient of x, from y and its gradient"),
        ("bool", "kLog", str(p.log).lower(), "the logarithm of the softmax"),
        ("Along", "kAlong", f"Along::{p.along}", "what sums to 1: each row, or each column"),
    ]


def _flags(p: SoftmaxProblem) -> list[str]:
    words = [f"--direction={p.direction}", f"--dtype={p.dtype}", f"--out-dtype={p.out_dtype}", f"--along={p.along}"]
    sizes = [f"--batch={p.batch}", f"--rows={p.rows}", f"--columns={p.columns}"]
    return ["--op", "softmax", *words, *(["--log"] if p.log else []), *sizes]


def _calls() -> Calls:
    from fagen.ops.softmax.calls import CALLS

    return CALLS


OP = Op(
    name="softmax",
    title="softmax",
    problem=SoftmaxProblem,
    header="fagen/abi/softmax.h",
    constants=_constants,
    features=lambda p, units: {"count": math.log2(p.count), "length": math.log2(p.length)},
    weights={"count": 0.5, "length": 1.0},
    flags=_flags,
    torch_serves=lambda p: True,
    length="length",
    symbols=_SYMBOLS,
    enums={"Along": ALONG},
    calls=_calls,
)
