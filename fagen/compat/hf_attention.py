"""What transformers calls for `attn_implementation="fagen"`. Imported by `hf.register` alone: needs transformers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from fagen import api
from fagen.compat.hf_masks import ColumnMask
from fagen.compat.sdpa import autocast
from fagen.errors import InvalidArgument, UnsupportedProblem
from fagen.ops.attention import fallback

# What changes the result and is not read here: to be refused, not to be lost.
_REFUSED = {
    "output_attentions": "the weights are never in memory",
    "block_table": "paged caches are not read",
    "block_indices": "sparse blocks are not read",
    "sinks": "only s_aux is read for sinks",
}


@dataclasses.dataclass
class _Scores:
    """What is done to the scores besides the mask."""

    scale: float | None
    softcap: float
    sinks: torch.Tensor | None
    bias: torch.Tensor | None
    dropout: float


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | ColumnMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query (batch, heads, rows, head_dim), fewer heads in key and value; returns (batch, rows, heads, head_dim).

    The mask says all there is to say of causality and windows; without one the module and `sliding_window` do.
    """
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UnsupportedProblem(f"{name}: {reason}", "", 'use attn_implementation="eager"')
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = autocast(query), autocast(key), autocast(value)
    mask = attention_mask
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = _unmasked(query, key, bool(causal), sliding_window)
    _check_rows(mask, query, key)
    mask = _within_sequences(mask, kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k"))
    scores = _Scores(scaling, softcap or 0.0, s_aux, position_bias, dropout)
    if isinstance(mask, ColumnMask) and key.shape[2] < mask.keys:
        mask = mask[..., : key.shape[2]]
    reason = _why_torch(mask, scores)
    if reason:
        fallback.warn(reason)
        return _by_torch(query, key, value, mask, scores).transpose(1, 2).contiguous(), None
    assert isinstance(mask, ColumnMask)
    q, k, v = (t.transpose(1, 2) for t in (query, key[:, :, : mask.keys], value[:, :, : mask.keys]))
    out = api.attention(
        q, k, v, **mask.options(q.device), softcap=scores.softcap, scale=scores.scale, sinks=scores.sinks,
        dropout_p=scores.dropout,
    )  # fmt: skip
    return out, None


def _why_torch(mask: torch.Tensor | ColumnMask, scores: _Scores) -> str:
    if scores.bias is not None:
        return "transformers gave a position bias"
    return "" if isinstance(mask, ColumnMask) else "transformers gave a dense mask"


# ---- masks ----------------------------------------------------------------------------------------------------------


def _unmasked(query: torch.Tensor, key: torch.Tensor, causal: bool, sliding_window: int | None) -> ColumnMask:
    """No mask was made: one row sees all keys; causal rows as many as there are keys."""
    rows, keys = query.shape[2], key.shape[2]
    if causal and rows > 1 and rows != keys:
        raise UnsupportedProblem(
            f"causal attention of {rows} rows over {keys} keys came without a mask",
            "which keys the rows see is not said",
        )
    window = sliding_window - 1 if sliding_window is not None and sliding_window < keys else None
    if window is not None and not causal:
        raise UnsupportedProblem(
            "a sliding window of an encoder came without a mask", f"sliding_window={sliding_window}"
        )
    return ColumnMask((query.shape[0], 1, rows, keys), keys, causal=causal and rows > 1, window=window)


def _check_rows(mask: torch.Tensor | ColumnMask, query: torch.Tensor, key: torch.Tensor) -> None:
    shape = tuple(mask.shape)
    if len(shape) != 4 or (shape[2] != query.shape[2] and shape[2] != 1) or shape[3] < key.shape[2]:
        have = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
        raise InvalidArgument(f"the mask has shape {shape}", have, "it must be (batch, 1 or heads, rows, keys)")


def _square(mask: torch.Tensor | ColumnMask) -> ColumnMask | None:
    """The mask, if it is of as many keys as rows."""
    return mask if isinstance(mask, ColumnMask) and mask.keys == mask.shape[2] == mask.shape[3] else None


def _within_sequences(
    mask: torch.Tensor | ColumnMask, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None
) -> torch.Tensor | ColumnMask:
    """Packed sequences that are told by where they begin: no row sees a key of another one."""
    if cu_q is None and cu_k is None:
        return mask
    same = cu_q is cu_k or (
        cu_q is not None and cu_k is not None and not torch.compiler.is_compiling() and torch.equal(cu_q, cu_k)
    )
    square, rows = _square(mask), mask.shape[2]
    if not same or cu_q is None or square is None or mask.shape[0] != 1:
        raise UnsupportedProblem(
            "cu_seq_lens_q and cu_seq_lens_k are read where they agree and no other mask stands beside them",
            f"the mask has shape {tuple(mask.shape)}", "pass position_ids instead",
        )  # fmt: skip
    position = torch.arange(rows, device=cu_q.device, dtype=cu_q.dtype)
    at = torch.searchsorted(cu_q, position, right=True)
    bounds = torch.nn.functional.pad(cu_q, (0, 1), value=rows)
    first, end = bounds[at - 1], bounds[at]
    intervals = square.intervals
    if intervals is not None:
        end = torch.minimum(end, intervals[0, 0, :, 0].to(end.device))
        first = first if intervals.shape[3] == 1 else torch.maximum(first, intervals[0, 0, :, 1].to(first.device))
    columns = torch.stack([end] if square.causal else [end, first], dim=-1)[None, None].to(torch.int32)
    return ColumnMask((1, 1, rows, rows), rows, causal=square.causal, window=square.window, intervals=columns)


# ---- by PyTorch -----------------------------------------------------------------------------------------------------


def _by_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | ColumnMask, scores: _Scores
) -> torch.Tensor:
    square = _square(mask)
    causal = square is not None and square.causal and square.window is None and square.intervals is None
    dense: torch.Tensor | None
    if isinstance(mask, ColumnMask):
        dense = None if mask.everything else mask.dense().to(q.device)
    else:
        dense = mask.to(q.device)[..., : k.shape[2]]
        dense = dense if dense.dtype == torch.bool else dense.to(q.dtype)
    if scores.softcap or scores.sinks is not None or scores.bias is not None:
        return _by_hand(q, k, v, dense, scores)
    shared = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, None if causal else dense, scores.dropout, is_causal=causal, scale=scores.scale, enable_gqa=shared
    )


def _by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dense: torch.Tensor | None, how: _Scores
) -> torch.Tensor:
    """All of it in float32 at least, in memory for all scores. A row that sees nothing gives 0."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group, keys = q.shape[1] // k.shape[1], k.shape[2]
    key, value = (t.to(wide).repeat_interleave(group, dim=1) for t in (k, v))
    scale = how.scale if how.scale is not None else 1 / math.sqrt(q.shape[3])
    scores = torch.matmul(q.to(wide) * scale, key.transpose(-1, -2))
    if how.softcap:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    if how.bias is not None:
        scores = scores + how.bias[..., :keys].to(wide)
    if dense is not None:
        scores = scores.masked_fill(~dense, -math.inf) if dense.dtype == torch.bool else scores + dense.to(wide)
    if how.sinks is not None:
        scores = torch.cat([scores, how.sinks.to(wide).reshape(-1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    top = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(top == -math.inf, 0, top))
    total = weights.sum(-1, keepdim=True)
    weights = (weights / torch.where(total == 0, 1, total))[..., :keys]
    return torch.matmul(torch.nn.functional.dropout(weights, how.dropout), value).to(q.dtype)
