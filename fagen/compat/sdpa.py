"""PyTorch's `scaled_dot_product_attention`: (batch, heads, rows, head_dim), causal aligned top-left."""

from __future__ import annotations

from typing import Any

import torch

from fagen import api
from fagen.ops.attention import arguments, call, derivatives, fallback
from fagen.ops.attention.derivatives import in_forward_mode


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
    """What we have no kernel for (a mask tensor, other ranks, broadcast batches) PyTorch computes.

    Obeys autocast. The output lies in memory as the query does, as PyTorch's own.
    """
    named = (("query", query), ("key", key), ("value", value))
    if not (isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)):
        for name, t in named:
            arguments.dense(name, t)
    is_causal = arguments.flag("is_causal", is_causal)
    if dropout_p != 0:
        dropout_p = arguments.probability("dropout_p", dropout_p)
    reason = _why_torch(query, key, value, attn_mask, enable_gqa)
    if reason:
        fallback.warn(reason)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (autocast(t) for t in (query, key, value))
    rows, keys, right = query.shape[2], key.shape[2], None
    if is_causal and rows != keys:
        if rows < keys:  # top-left: no row sees a key behind the last row
            key, value = key[:, :, :rows], value[:, :, :rows]
        # the diagonal that starts top-left lies this far right of the one that ends bottom-right
        right, is_causal = max(0, rows - keys), False
    if api._fast_sdpa is not None and not torch.compiler.is_compiling():
        answer: torch.Tensor | None = api._fast_sdpa(
            query, key, value, "bhsd", is_causal, (None, right), None, 0.0, None, scale, False, None, False, dropout_p
        )
        if answer is not None:
            return answer
    for name, t in named:
        arguments.dense(name, t)
    return _in_order(query, key, value, causal=is_causal, window=(None, right), scale=scale, dropout_p=dropout_p)


def _in_order(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
    """With batches, heads and rows one inside the other in memory as the query's are; an expanded query's, as named."""
    strides = query.stride()[:3]
    batches, heads, rows = strides
    if batches >= heads >= rows:
        return api.attention(query, key, value, layout="bhsd", **how)
    tensors = (t.transpose(1, 2) for t in (query, key, value))
    result = api.attention(*tensors, **how).transpose(1, 2)
    if batches >= rows >= heads:
        return result
    order = sorted(range(3), key=lambda i: -strides[i]) if 0 not in strides else [0, 1, 2]
    return result.permute(*order, 3).contiguous().permute(*(order.index(i) for i in range(3)), 3)


def autocast(t: torch.Tensor) -> torch.Tensor:
    """Into the dtype that autocast gives PyTorch's own; float64 it lets alone."""
    if not t.dtype.is_floating_point or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype(t.device.type))


def _why_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    enable_gqa: bool,
) -> str:
    if attn_mask is not None:
        return "sdpa was given a mask tensor (fagen.masks makes intervals, which kernels understand)"
    if query.is_nested or key.is_nested or value.is_nested:
        return "sdpa was given nested tensors"
    if not query.dim() == key.dim() == value.dim() == 4:
        return "sdpa was given tensors that have not 4 dimensions"
    if query.device.type not in ("cpu", "cuda"):
        return f"no kernels for device {query.device.type}"
    shape, of_keys, of_values = query.shape, key.shape, value.shape
    if 0 in shape or 0 in of_keys or 0 in of_values:
        return call.EMPTY
    heads_agree = shape[1] == of_keys[1] == of_values[1]
    if shape[0] != of_keys[0] or of_keys[:3] != of_values[:3] or not (heads_agree or enable_gqa):
        return "sdpa was given tensors that broadcast"
    return "" if in_forward_mode() else derivatives.refusal(query, key, value, None)
