"""The forward op: softmax(scale * q k^T) v."""

from __future__ import annotations

from typing import Any

from fagen.ops.attention import flags, size_point, work
from fagen.ops.attention.problem import INTERVAL_KINDS, MASKS, Problem
from fagen.ops.base import Calls, Constant, Op

SYMBOLS = (
    "Symbols: m rows of q, n keys; S = scale * Q K^T the scores, P = exp(S - max) the weights, O = P V / sum P.",
    "Names: kCamel is known at compile time, snake_case at run time; *_log2 lives in the base-2 logarithm.",
)
ENUMS = {"Mask": MASKS}


def _constants(p: Problem) -> list[Constant]:
    rows = [
        ("int", "kHeadDim", str(p.head_dim_padded), "of q and k, padded"),
        ("int", "kHeadDimV", str(p.head_dim_v_padded), "of v and o, padded"),
        ("Mask", "kMask", f"Mask::{p.mask}", "which cells are visible"),
        ("bool", "kSoftcap", str(p.softcap).lower(), "s -> softcap * tanh(s / softcap)"),
        ("bool", "kAlibi", str(p.alibi).lower(), "s -> s - slope * distance from the diagonal"),
        ("bool", "kDropout", str(p.dropout).lower(), "weights are dropped at random"),
        ("bool", "kAligned", str(p.aligned).lower(), "rows are whole, aligned 16-byte pieces"),
        ("int", "kIntervalColumns", str(len(INTERVAL_KINDS.get(p.intervals, ()))), "bounds a key carries"),
    ]
    for bound, column in _bound_columns(p).items():
        rows.append(("int", f"k{bound}", str(column), f"column of {bound} in intervals, -1: absent"))
    return rows


def _bound_columns(p: Problem) -> dict[str, int]:
    have = INTERVAL_KINDS.get(p.intervals, ())
    return {name: have.index(name) if name in have else -1 for name in ("LTS", "LTE", "UTS", "UTE")}


def _example_names(p: Problem) -> dict[str, Any]:
    return {"columns": len(INTERVAL_KINDS.get(p.intervals, ())), "bounds": _bound_columns(p)}


def _torch_serves(p: Problem) -> bool:
    """Without a mask tensor: as `fallback` asks SDPA. `Plan::find` in C++ asks the same. SDPA drops other weights."""
    return p.mask in ("none", *(["causal"] if p.seqlen_q == p.seqlen_k else [])) and not (
        p.softcap or p.alibi or p.dropout
    )


def _calls() -> Calls:
    from fagen.ops.attention.forward_calls import CALLS

    return CALLS


OP = Op(
    name="forward",
    title="attention forward",
    problem=Problem,
    header="fagen/abi/forward.h",
    constants=_constants,
    features=size_point.features,
    weights=size_point.WEIGHTS,
    flags=flags.of,
    torch_serves=_torch_serves,
    regime=size_point.regime,
    length="seqlen_q",
    least_bytes=work.least_bytes,
    symbols=SYMBOLS,
    enums=ENUMS,
    calls=_calls,
    example_names=_example_names,
    example="example/main.j2",
)
