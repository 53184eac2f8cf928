"""Attention by PyTorch itself, for what no kernel of ours serves: slower, and right, masks and gradients included."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

from fagen.ops.attention.masks import interval_kind
from fagen.ops.attention.problem import Problem
from fagen.ops.attention.reference import Semantics, row_blocks
from fagen.ops.attention.reference import attend as plain_attend

EMPTY = "there is nothing to compute"
NO_BACKWARD = "the inputs need gradients, and fagen has no backward kernel yet"

_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """A call is served by PyTorch; the message says why."""


def warn(reason: str) -> None:
    """Once a reason and process, and never while torch.compile traces."""
    if torch.compiler.is_compiling() or reason in _warned or reason == EMPTY:
        return
    _warned.add(reason)
    warnings.warn(f"fagen: PyTorch computes instead: {reason}", FallbackWarning, stacklevel=4)


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether a derivative is wanted, reverse or forward. For torch.func's own tensors the op answers that."""
    some = [t for t in tensors if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in some):
        return True
    if not in_forward_mode():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(not wrapped(t) and forward_ad.unpack_dual(t).tangent is not None for t in some)


def in_forward_mode() -> bool:
    """Whether dual numbers may be about: PyTorch's own attention kernels have no forward derivative."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str,
    causal: bool,
    window: tuple[int, int],
    intervals: torch.Tensor | None,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    scale: float | None,
    want_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in the caller's layout and dtype. Without `want_lse` the lse may be empty.

    With it, all is computed by products of matrices, whose gradient is the same bits each time.
    """
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    kind = interval_kind(intervals.shape[3], causal) if intervals is not None else ""
    semantics = Semantics((window[0], 0) if causal else window, kind, softcap, scale)
    plain = not want_lse and intervals is None and alibi_slopes is None
    device = q.device.type  # the result has the inputs' dtype, as a kernel's has, whatever autocast would make of it
    with torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext():
        if 0 in q.shape or 0 in k.shape:
            out, lse = q.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
        elif plain and _sdpa_serves(q, k, semantics):
            out, lse = _by_sdpa(q, k, v, semantics), q.new_empty(0, dtype=torch.float32)
        else:
            out, lse = _by_blocks(q, k, v, semantics, intervals, alibi_slopes)
    out = out.transpose(1, 2) if layout == "bshd" else out
    return out.contiguous(), lse


def _sdpa_serves(q: torch.Tensor, k: torch.Tensor, semantics: Semantics) -> bool:
    window, scale = semantics.window, semantics.scale
    if semantics.softcap or (scale is not None and not scale > 0):  # SDPA's own GPU kernels give NaN there
        return False
    square = window == (-1, 0) and q.shape[2] == k.shape[2]
    return (window == (-1, -1) or square) and not in_forward_mode()


def _by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, semantics: Semantics) -> torch.Tensor:
    shared = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=semantics.window == (-1, 0), scale=semantics.scale, enable_gqa=shared
    )


def _by_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    semantics: Semantics,
    intervals: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of rows, so that the scores of long sequences fit; halves are computed in float32."""
    wide = torch.float32 if q.dtype.itemsize < 4 else q.dtype
    dtype, (q, k, v) = q.dtype, (t.to(wide) for t in (q, k, v))
    outs, lses = [], []
    for rows, seen in row_blocks(q, k, semantics, intervals):
        out, lse = plain_attend(q, k, v, seen, semantics, alibi_slopes, rows)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=2).to(dtype), torch.cat(lses, dim=2).float()


_MASK_BYTES = 1 << 30  # the largest dense mask that PyTorch's SDPA is given


def sdpa_call(problem: Problem, inputs: dict[str, Any]) -> tuple[Callable[[], object], str] | None:
    """PyTorch's SDPA on the same inputs and how it is asked, or None where it cannot do this."""
    import torch

    from fagen.ops.attention import masks

    if problem.softcap or problem.alibi:
        return None
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    arguments: dict[str, Any] = {"enable_gqa": problem.heads != problem.kv_heads}
    band = (problem.window_left, problem.window_right)
    how = "no mask"
    if problem.mask == "causal" and problem.seqlen_q == problem.seqlen_k:
        arguments["is_causal"], how = True, "is_causal"
    elif problem.mask != "none":
        planes = problem.batch * problem.heads if problem.mask == "intervals" else 1
        if planes * problem.seqlen_q * problem.seqlen_k > _MASK_BYTES:
            return None
        arguments["attn_mask"] = masks.dense(
            problem.seqlen_q, problem.seqlen_k, window=band, intervals=inputs["intervals"], kind=problem.intervals,
            device=q.device,
        )  # fmt: skip
        how = "attn_mask"
    call = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, **arguments)
    return call, how
