"""PyTorch's `scaled_dot_product_attention`: (batch, heads, rows, head_dim), causal aligned top-left."""

from __future__ import annotations

from typing import Any

import torch

from fagen import arguments, fallback
from fagen.api import attention


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
    """What we have no kernel for (a mask tensor, dropout, gradients, other ranks, broadcast batches) PyTorch computes.

    Obeys autocast. The output lies in memory as the query does, as PyTorch's own.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor) or (t.layout != torch.strided and not t.is_nested):
            arguments.dense(name, t)
    is_causal = arguments.flag("is_causal", is_causal)
    if dropout_p != 0:
        dropout_p = arguments.probability("dropout_p", dropout_p)
    reason = _why_torch(query, key, value, attn_mask, dropout_p, enable_gqa)
    if reason:
        fallback.warn(reason)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (_autocast(t) for t in (query, key, value))
    rows, keys = query.shape[2], key.shape[2]
    how: dict[str, Any] = {"scale": scale}
    if not is_causal or rows == keys:
        how["causal"] = is_causal
    else:
        if rows < keys:  # top-left: no row sees a key behind the last row
            key, value = key[:, :, :rows], value[:, :, :rows]
        # the diagonal that starts top-left lies this far right of the one that ends bottom-right
        how["window"] = (None, max(0, rows - keys))
    batches, heads, apart = query.stride()[:3]
    if batches >= heads >= apart:
        return attention(query, key, value, layout="bhsd", **how)  # type: ignore[return-value]
    tensors = (t.transpose(1, 2) for t in (query, key, value))
    result = attention(*tensors, **how).transpose(1, 2)  # type: ignore[union-attr]
    return result if batches >= apart >= heads else _in_order_of(query, result)


def _autocast(t: torch.Tensor) -> torch.Tensor:
    """Into the dtype that autocast gives PyTorch's own; float64 it lets alone."""
    if not t.dtype.is_floating_point or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def _in_order_of(query: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Batches, heads and rows one inside the other in memory as the query's are; in their order if it is expanded."""
    strides = query.stride()
    order = sorted(range(3), key=lambda i: -strides[i]) if 0 not in strides[:3] else [0, 1, 2]
    return result.permute(*order, 3).contiguous().permute(*(order.index(i) for i in range(3)), 3)


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
    if query.is_nested or key.is_nested or value.is_nested:
        return "sdpa was given nested tensors"
    if not query.dim() == key.dim() == value.dim() == 4:
        return "sdpa was given tensors that have not 4 dimensions"
    if query.device.type not in ("cpu", "cuda"):
        return f"no kernels for device {query.device.type}"
    shape, of_keys, of_values = query.shape, key.shape, value.shape
    if 0 in shape or 0 in of_keys or 0 in of_values:
        return fallback.EMPTY
    heads_agree = shape[1] == of_keys[1] == of_values[1]
    if shape[0] != of_keys[0] or of_keys[:3] != of_values[:3] or not (heads_agree or enable_gqa):
        return "sdpa was given tensors that broadcast"
    wants_grad = query.requires_grad or key.requires_grad or value.requires_grad
    if wants_grad and torch.is_grad_enabled() and not fallback.in_forward_mode():
        return fallback.NO_BACKWARD
    return ""
