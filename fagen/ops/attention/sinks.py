"""Attention sinks: a learned logit a head that joins the softmax's sum and has no value.

They are applied to the output and the LSE of a call without them: no kernel of ours takes them yet.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments


def check(sinks: Any, heads: int, device: torch.device) -> None:
    """Raise InvalidArgument for what is no sinks of a call with so many heads."""
    arguments.dense("sinks", sinks)
    if not sinks.dtype.is_floating_point or sinks.dtype.itemsize < 2:
        raise InvalidArgument("sinks must have a floating-point dtype", f"they have {sinks.dtype}")
    if sinks.device != device:
        raise InvalidArgument(f"sinks are on {sinks.device}", f"q is on {device}")
    if tuple(sinks.shape) != (heads,):
        raise InvalidArgument("sinks must have shape (heads)", f"they have {tuple(sinks.shape)}, heads={heads}")


def apply(
    out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, layout: str, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) with the sinks in the sum: out * exp(lse) / (exp(lse) + exp(sink)), in the dtype of the LSE.

    `out` itself is changed where `in_place` says so, or where nothing else can tell.
    """
    column = sinks.to(lse.dtype)[:, None]  # lse is (batch, heads, rows)
    # a row that sees nothing has lse = -inf, and out = 0 whatever the factor
    factor = torch.sigmoid(torch.where(lse == -math.inf, 0.0, lse) - column)
    factor = (factor.transpose(1, 2) if layout == "bshd" else factor)[..., None]
    lse = torch.logaddexp(lse, column)
    if in_place or _nobody_differentiates(out, factor):
        return out.mul_(factor), lse
    return (out * factor).to(out.dtype), lse


def _nobody_differentiates(*tensors: torch.Tensor) -> bool:
    """Neither autograd nor a transform of torch.func. A compiler fuses both ways alike."""
    if torch.compiler.is_compiling() or any(t.requires_grad for t in tensors):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None
