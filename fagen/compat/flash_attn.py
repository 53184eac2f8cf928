"""FlashAttention 2's `flash_attn_func`: its arguments, their order, what it returns."""

from __future__ import annotations

import torch

from fagen import api
from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Layout (batch, seqlen, heads, head_dim), causal and window aligned bottom-right.

    With `return_attn_probs`: (out, softmax_lse, None). Forward kernels are deterministic whatever is asked; a
    gradient is if `deterministic`.
    """
    want_probs = arguments.flag("return_attn_probs", return_attn_probs)
    result = api.attention(
        q, k, v, causal=causal, window=window_bounds(window_size), softcap=softcap, alibi_slopes=alibi_slopes,
        scale=softmax_scale, return_lse=want_probs, deterministic=deterministic, dropout_p=dropout_p,
    )  # fmt: skip
    if isinstance(result, torch.Tensor):
        return result
    return (*result, None)


def window_bounds(window_size: tuple[int, int]) -> tuple[int | None, int | None]:
    """Theirs says -1, or any negative number, where there is no bound."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise InvalidArgument(f"window_size={arguments.shown(window_size)} is not (left, right)")
    left, right = (arguments.integer("window_size", bound) for bound in window_size)
    return None if left < 0 else left, None if right < 0 else right
