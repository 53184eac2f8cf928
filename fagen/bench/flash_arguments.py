"""The arguments of FlashAttention's functions and ops, whose names and number differ between their versions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fagen.bench.peers import Cannot
from fagen.bench.rows import Inputs, Row

if TYPE_CHECKING:
    import torch

# Our name of an argument, and the names that the versions give it.
_ALIASES = {
    "causal": ("is_causal", "causal"),
    "window_left": ("window_size_left", "window_left"),
    "window_right": ("window_size_right", "window_right"),
    "scale": ("softmax_scale",),
}
# arguments that only some versions have, and that change no result
_MAY_LACK = ("num_splits", "max_seqlen_q", "max_seqlen_k")


@dataclass(frozen=True)
class Argument:
    name: str
    optional: bool
    kind: str


def of_schema(schema: Any) -> list[Argument]:
    """The arguments of an op of torch."""
    return [Argument(a.name, a.has_default_value(), str(a.type)) for a in schema.arguments]


def of_function(function: Callable[..., Any]) -> list[Argument]:
    """The arguments of a Python function."""
    found = inspect.signature(function).parameters.values()
    return [Argument(p.name, p.default is not p.empty, str(p.annotation)) for p in found]


def require(row: Row) -> None:
    """What none of these has here: float32, ALiBi as a tensor on Hopper, intervals but of packed documents, dropout."""
    p = row.problem
    if p.dtype not in ("fp16", "bf16"):
        raise Cannot(f"it has no {p.dtype}")
    if p.dropout:
        raise Cannot("its dropout is not measured, or it has none")
    if p.alibi:
        raise Cannot("it has no ALiBi")
    if p.mask == "intervals" and not row.documents:
        raise Cannot("it has no such mask")


def lengths(row: Row, device: torch.device) -> torch.Tensor:
    """Where each document of the packed batch begins, and the end."""
    import torch

    lengths = torch.tensor((0, *row.documents * row.problem.batch))
    return lengths.cumsum(0).to(device=device, dtype=torch.int32)


def packed(i: Inputs) -> list[torch.Tensor]:
    """q, k and v, all sequences one behind the other."""
    return [t.flatten(0, 1) for t in (i.call.q, i.call.k, i.call.v)]


def fill(
    arguments: Iterable[Argument], wanted: Mapping[str, Any], tensors: Iterable[str] = ("q", "k", "v")
) -> dict[str, Any]:
    """Arguments by name: those wanted, and something neutral for others that have no default.

    `tensors` are given at each call, and only looked for.
    """
    left, given, needed = dict(wanted), {}, set(tensors)
    for argument in arguments:
        ours = next((name for name, theirs in _ALIASES.items() if argument.name in theirs), argument.name)
        if argument.name in needed:
            needed.remove(argument.name)
        elif ours in left:
            given[argument.name] = left.pop(ours)
        elif not argument.optional:
            given[argument.name] = _neutral(argument.name, argument.kind)
    missing = [*sorted(needed), *(name for name, value in left.items() if name not in _MAY_LACK and _matters(value))]
    if missing:
        raise Cannot(f"this version of it has no argument {missing[0]}")
    return given


def _matters(value: Any) -> bool:
    return value is not None and not (isinstance(value, int | float) and value in (0, -1))


def _neutral(name: str, kind: str) -> Any:
    if kind.startswith("Optional"):
        return None
    return {"int": -1 if "window" in name else 0, "float": 0.0, "bool": False}.get(kind)


def settings(row: Row, unbounded: int | None) -> dict[str, Any]:
    from fagen.ops.attention.inputs import SOFTCAP

    p = row.problem
    causal = row.causal and p.window_left < 0  # a causal window is the window (left, 0)
    left, right = p.window_left, -1 if causal else p.window_right
    return {
        "causal": causal,
        "window_left": unbounded if left < 0 else left,
        "window_right": unbounded if right < 0 else right,
        "softcap": SOFTCAP if p.softcap else 0.0,
        "scale": 1.0 / math.sqrt(p.head_dim),
        "num_splits": 1,  # what its own flash_attn_func takes
    }


def document_arguments(row: Row, device: torch.device) -> dict[str, Any]:
    if not row.documents:
        return {}
    starts, longest = lengths(row, device), max(row.documents)
    return {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
