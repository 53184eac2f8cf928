"""PyTorch's `scaled_dot_product_attention`: (batch, heads, rows, head_dim), causal aligned top-left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What we have no kernel for (a mask tensor, dropout, other ranks, broadcast batches) PyTorch computes itself."""
    import torch

    from fagen import fallback
    from fagen.api import attention

    reason = _why_torch(query, key, value, attn_mask, dropout_p, enable_gqa)
    if reason:
        fallback.warn(reason)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    rows, keys = query.shape[2], key.shape[2]
    if not is_causal or rows == keys:
        return attention(query, key, value, layout="bhsd", causal=is_causal, scale=scale)  # type: ignore[return-value]
    if rows < keys:  # top-left: no row sees a key behind the last row
        key, value = key[:, :, :rows], value[:, :, :rows]
    # the diagonal that starts top-left lies this far right of the one that ends bottom-right
    right = max(0, rows - keys)
    return attention(query, key, value, layout="bhsd", window=(None, right), scale=scale)  # type: ignore[return-value]


def _why_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
) -> str:
    if attn_mask is not None:
        return "sdpa was given a mask tensor (fagen.masks makes intervals, which kernels understand)"
    if dropout_p > 0:
        return "sdpa was asked for dropout"
    if not query.dim() == key.dim() == value.dim() == 4:
        return "sdpa was given tensors that have not 4 dimensions"
    heads_agree = query.shape[1] == key.shape[1] == value.shape[1]
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3] or not (heads_agree or enable_gqa):
        return "sdpa was given tensors that broadcast"
    return ""
