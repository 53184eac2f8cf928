"""The decode op: attention of few query rows a sequence on a cache of keys and values, paged or not."""

from __future__ import annotations

import math

from fagen.ops.attention import forward
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.ops.attention.flags import of as forward_flags
from fagen.ops.base import Calls, Constant, Op

__all__ = ["OP", "DecodeProblem"]

WEIGHTS = {"keys": 1.0, "waves": 1.0, "rows": 0.5}
_MOST_WAVES, _LEAST_WAVES = 8.0, 1 / 256  # of (sequence, kv head) over the units: fewer are split along their keys


def _constants(p: DecodeProblem) -> list[Constant]:
    return [
        ("int", "kHeadDim", str(p.head_dim_padded), "of q and k, padded"),
        ("int", "kHeadDimV", str(p.head_dim_v_padded), "of v and o, padded"),
        ("Mask", "kMask", f"Mask::{p.mask}", "which cells are visible"),
        ("bool", "kSoftcap", str(p.softcap).lower(), "s -> softcap * tanh(s / softcap)"),
        ("bool", "kSinks", str(p.sinks).lower(), "each head has a logit without a value"),
        ("bool", "kAligned", str(p.aligned).lower(), "rows are whole, aligned 16-byte pieces"),
        ("bool", "kFp8Cache", str(p.kv_dtype == "fp8_e4m3").lower(), "k and v are e4m3, else of the dtype of q"),
        ("int", "kPageSize", str(p.page), "rows of a page, 0: the cache is not paged"),
        ("bool", "kSharedKv", str(p.shared_kv).lower(), "v is the first columns of k"),
    ]


def features(p: DecodeProblem, units: int) -> dict[str, float]:
    """Of a size point, in doublings. `keys` that a row may see; `waves` of (sequence, kv head) over the units; `rows`
    that share the keys of a kv head: query tokens times heads of a group."""
    keys = p.seqlen_k if p.window_left < 0 else min(p.seqlen_k, p.window_left + p.seqlen_q)
    waves = p.batch * p.kv_heads / max(1, units)
    return {
        "keys": math.log2(keys),
        "waves": math.log2(min(max(waves, _LEAST_WAVES), _MOST_WAVES)),
        "rows": math.log2(p.seqlen_q * (p.heads // p.kv_heads)),
    }


def _flags(p: DecodeProblem) -> list[str]:
    words = ["--op", "decode", *forward_flags(p, one_length=False)]
    words += ["--kv-dtype", p.kv_dtype] if p.kv_dtype else []
    words += ["--page", str(p.page)] if p.page else []
    words += ["--shared-kv"] if p.shared_kv else []
    return words + (["--sinks"] if p.sinks else [])


def _calls() -> Calls:
    from fagen.ops.attention.decode_calls import CALLS

    return CALLS


OP = Op(
    name="decode",
    title="attention decode",
    problem=DecodeProblem,
    header="fagen/abi/decode.h",
    constants=_constants,
    features=features,
    weights=WEIGHTS,
    flags=_flags,
    torch_serves=lambda p: False,  # it does not read lengths on the device
    length="seqlen_k",
    symbols=forward.SYMBOLS,
    enums=forward.ENUMS,
    calls=_calls,
    example="example/decode.j2",
)
