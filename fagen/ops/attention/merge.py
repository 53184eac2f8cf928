"""Attention on parts of the keys, put together: a prefix that sequences share, splits, devices of a ring."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments


def merge_states(
    outs: Sequence[torch.Tensor] | torch.Tensor, lses: Sequence[torch.Tensor] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) on all keys, of the same on parts of them that have no key in common.

    Each `out` is (batch, rows, heads, head_dim) with an `lse` (batch, heads, rows), or packed (rows, heads, head_dim)
    with (heads, rows), as `fagen.flash_attn_with_kvcache` returns them; the parts are a list, or stacked in front. A
    part in which a row sees nothing has an LSE of -inf there. A sink belongs to one part only.
    """
    parts, columns = list(outs), list(lses)
    if not parts or len(parts) != len(columns):
        raise InvalidArgument("as many outputs as LSEs, and at least one", f"{len(parts)} and {len(columns)}")
    for out, lse in zip(parts, columns, strict=True):
        _check(out, lse, parts[0])
    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    weights = torch.stack([lse.to(wide) for lse in columns])
    most = weights.amax(0)
    weights = torch.exp(weights - torch.where(most == -math.inf, 0, most))
    total = weights.sum(0)
    share = (weights / torch.where(total == 0, 1, total)).transpose(-1, -2)[..., None]
    # what a part that weighs nothing holds does not count, not even NaN
    found = sum(torch.where(w == 0, 0, out.to(wide) * w) for out, w in zip(parts, share, strict=True))
    assert isinstance(found, torch.Tensor)
    return found.to(parts[0].dtype), torch.where(total == 0, -math.inf, most + torch.log(total))


def _check(out: torch.Tensor, lse: torch.Tensor, first: torch.Tensor) -> None:
    for name, t in (("out", out), ("lse", lse)):
        arguments.dense(name, t)
    wanted = (*first.shape[:-3], first.shape[-2], first.shape[-3]) if first.dim() in (3, 4) else None
    if wanted is None or out.shape != first.shape or tuple(lse.shape) != wanted:
        have = f"out {tuple(out.shape)}, lse {tuple(lse.shape)}"
        raise InvalidArgument("parts must be (batch, rows, heads, head_dim) with an LSE (batch, heads, rows)", have)
    if out.dtype != first.dtype or not (out.device == lse.device == first.device):
        raise InvalidArgument("parts must have one dtype and device", f"{out.dtype} {out.device}, {lse.device}")
