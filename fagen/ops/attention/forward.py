"""The forward op: softmax(scale * q k^T) v."""

from __future__ import annotations

from fagen.ops.attention import flags, size_point
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.ops.base import Calls, Constant, Op


def _constants(p: Problem) -> list[Constant]:
    have = INTERVAL_KINDS.get(p.intervals, ())
    rows = [
        ("int", "kHeadDim", str(p.head_dim_padded), "of q and k, padded"),
        ("int", "kHeadDimV", str(p.head_dim_v_padded), "of v and o, padded"),
        ("Mask", "kMask", f"Mask::{p.mask}", "which cells are visible"),
        ("bool", "kSoftcap", str(p.softcap).lower(), "s -> softcap * tanh(s / softcap)"),
        ("bool", "kAlibi", str(p.alibi).lower(), "s -> s - slope * distance from the diagonal"),
        ("bool", "kAligned", str(p.aligned).lower(), "rows are whole, aligned 16-byte pieces"),
        ("int", "kIntervalColumns", str(len(have)), "bounds a key carries"),
    ]
    for bound in ("LTS", "LTE", "UTS", "UTE"):
        index = have.index(bound) if bound in have else -1
        rows.append(("int", f"k{bound}", str(index), f"column of {bound} in intervals, -1: absent"))
    return rows


def _torch_serves(p: Problem) -> bool:
    """Without a mask tensor: as `fallback` asks SDPA. `Plan::find` in C++ asks the same."""
    return p.mask in ("none", *(["causal"] if p.seqlen_q == p.seqlen_k else [])) and not (p.softcap or p.alibi)


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
    calls=_calls,
    example="example/main.j2",
)
