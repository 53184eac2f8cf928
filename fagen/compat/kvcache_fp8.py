"""fp8 queries on a cache: turned into numbers that hold every fp8 number, times their scale."""

from __future__ import annotations

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments
from fagen.ops.attention.fp8_call import E4M3


def wide(
    q: torch.Tensor, descale: torch.Tensor | None, k_cache: torch.Tensor, starts: torch.Tensor | None
) -> torch.Tensor:
    """q in the cache's dtype, bfloat16 beside an fp8 cache; `descale`: float32 (batch, kv_heads), as k_descale."""
    if getattr(q, "dtype", None) != E4M3:
        raise InvalidArgument("q_descale goes with a float8_e4m3fn q", f"q is {getattr(q, 'dtype', type(q).__name__)}")
    for name, t, least in (("q", q, 3), ("k_cache", k_cache, 4)):
        arguments.dense(name, t)
        if t.dim() < least:
            raise InvalidArgument(f"{name} has {t.dim()} dimensions", f"its shape is {tuple(t.shape)}")
    dtype = torch.bfloat16 if k_cache.dtype == E4M3 else k_cache.dtype
    if descale is None:
        return q.to(dtype)
    if starts is not None and (not starts.shape[0] or starts.device != q.device):
        return q.to(dtype)  # refused as where q is no fp8
    arguments.dense("q_descale", descale)
    heads, kv_heads = q.shape[-2], k_cache.shape[-2]
    batch = q.shape[0] if starts is None else starts.shape[0] - 1
    if descale.dtype != torch.float32 or descale.shape != (batch, kv_heads) or descale.device != q.device:
        raise InvalidArgument(
            f"q_descale must be float32 ({batch}, {kv_heads}) on {q.device}",
            f"it is {descale.dtype} {tuple(descale.shape)} on {descale.device}",
        )
    if not kv_heads or heads % kv_heads:
        return q.to(dtype)  # likewise
    scale = descale.repeat_interleave(heads // kv_heads, 1)
    if starts is None:
        scale = scale[:, None]
    else:  # the sequence of each packed row; nothing waits for the device
        rows = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
        scale = scale[torch.searchsorted(starts[1:].contiguous(), rows, right=True).clamp_(max=max(0, batch - 1))]
    return (q.float() * scale[..., None]).to(dtype)
