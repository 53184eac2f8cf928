"""A call of `fagen.attention` as a problem on a target, or why no kernel of ours can serve it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fagen.ops.attention import arguments, fallback
from fagen.ops.attention.arguments import Window
from fagen.ops.attention.masks import interval_kind
from fagen.ops.attention.params import ALIGNMENT, is_aligned
from fagen.ops.attention.problem import MAX_HEAD_DIM, TORCH_DTYPES, Problem
from fagen.ops.attention.reference import Semantics
from fagen.target import Target, target_of

_DTYPES = {getattr(torch, theirs): ours for ours, theirs in TORCH_DTYPES.items()}
_LONGEST = 1 << 29  # rows or keys: what a kernel takes for "without bound" lies there


def _refusal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alibi_slopes: torch.Tensor | None, scale: float | None
) -> str:
    """Why the ops cannot be asked at all; "" if they can."""
    if fallback.differentiated(q, k, v, alibi_slopes):
        return fallback.NO_BACKWARD
    if scale is not None and not scale >= arguments.LEAST_NUMBER:
        return f"scale={scale} is not positive"  # the kernels take the maximum before they scale
    if q.device.type not in ("cpu", "cuda"):
        return f"no kernels for device {q.device.type}"
    return ""


# ---- from a call to a kernel --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A valid call in the words of the other modules. If no problem describes it, `refusal` says why."""

    problem: Problem | None
    target: Target | None
    semantics: Semantics
    refusal: str = ""


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str = "bshd",
    causal: bool = False,
    window: Window = (None, None),
    intervals: torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Call:
    """What a call of `attention` asks for. Raises InvalidArgument with what is wrong with it."""
    arguments.flag("return_lse", return_lse)
    causal, (left, right), softcap, scale = arguments.check(
        q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, out
    )
    kind = interval_kind(intervals.shape[3], causal) if intervals is not None else ""
    semantics = Semantics((left, right), kind, softcap, scale)
    target = target_of(q.device)
    refusal = _refusal(q, k, v, alibi_slopes, scale) or _unservable(q, k, v, intervals, alibi_slopes, out)
    if target is None and not refusal:
        refusal = f"no kernels for device {q.device}"
    if refusal:
        return Call(None, target, semantics, refusal)
    mask = "intervals" if kind else {(-1, -1): "none", (-1, 0): "causal"}.get((left, right), "window")
    row, head = (1, 2) if layout == "bshd" else (2, 1)
    tensors = (q, k, v) if out is None else (q, k, v, out)
    fresh_out_aligned = out is not None or v.shape[3] * v.element_size() % ALIGNMENT == 0
    problem = Problem(
        dtype=_DTYPES[q.dtype],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        mask=mask,
        intervals=kind,
        softcap=bool(softcap),
        alibi=alibi_slopes is not None,
        aligned=fresh_out_aligned and all(is_aligned(t) for t in tensors),
        batch=q.shape[0],
        heads=q.shape[head],
        kv_heads=k.shape[head],
        seqlen_q=q.shape[row],
        seqlen_k=k.shape[row],
        window_left=left,
        window_right=right,
    )
    return Call(problem, target, semantics)


def _unservable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor | None,
) -> str:
    """Why no family could take the tensors as they are; "" if one might."""
    if 0 in q.shape or 0 in k.shape:
        return fallback.EMPTY
    if q.dtype not in _DTYPES:
        return f"no kernels for {q.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head_dim {max(q.shape[3], v.shape[3])} is larger than {MAX_HEAD_DIM}"
    if max(*q.shape, *k.shape) > _LONGEST:
        return f"a size is larger than {_LONGEST}"
    named = {"q": q, "k": k, "v": v, "out": out, "intervals": intervals, "alibi_slopes": alibi_slopes}
    for name, t in named.items():
        if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1:
            return f"the last dimension of {name} is not contiguous"
    return ""
