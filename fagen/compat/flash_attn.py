"""FlashAttention 2's `flash_attn_func`: its arguments, their order, what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fagen.errors import UnsupportedProblem

if TYPE_CHECKING:
    import torch


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

    With `return_attn_probs`: (out, softmax_lse, None). Forward kernels are deterministic whatever is asked.
    """
    from fagen.api import attention

    if dropout_p > 0:
        raise UnsupportedProblem("dropout is not supported", f"dropout_p={dropout_p}", "pass dropout_p=0.0")
    left, right = window_size
    window = (None if left < 0 else left, None if right < 0 else right)
    result = attention(
        q, k, v, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes, scale=softmax_scale,
        return_lse=return_attn_probs,
    )  # fmt: skip
    return (*result, None) if return_attn_probs else result
