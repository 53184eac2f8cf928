"""`fagen.mla_decode`: decoding of latent attention, whose cache has one row a token for all heads."""

from __future__ import annotations

import torch

from fagen.compat.kvcache import flash_attn_with_kvcache
from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    cache_seqlens: int | torch.Tensor | None = None,
    *,
    page_table: torch.Tensor | None = None,
    v_dim: int = 512,
    scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    num_splits: int = 0,
    numerics: str = "tuned",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of the heads of q to a latent cache (MLA): out (batch, tokens, heads, v_dim), or (out, lse).

    q is (batch, tokens, heads, d), or (rows, heads, d) with cu_seqlens_q, after the products that take heads into the
    latent space: d is 576 in DeepSeek's models, 512 latent columns and 64 rotary ones. A row of the cache is the key
    of all heads, and its first v_dim columns are the value; they are read once.

    kv_cache          (batch, seqlen, d), or pages (pages, rows of a page, d); a dimension of one head before d is fine
    cache_seqlens     int32 (batch): keys of each sequence, or one number for all; None: the cache is full
    page_table        int32 (batch, pages of a sequence)
    scale             multiplies q k; None: 1 / sqrt(d), which is not what models of heads in another space want
    causal            tokens of a step are aligned with the last keys, as in `fagen.flash_attn_with_kvcache`

    The other arguments are those of `fagen.flash_attn_with_kvcache`. There is no gradient.
    """
    if not isinstance(kv_cache, torch.Tensor) or kv_cache.dim() not in (3, 4):
        have = f"it is {tuple(kv_cache.shape)}" if isinstance(kv_cache, torch.Tensor) else arguments.shown(kv_cache)
        raise InvalidArgument("kv_cache must be (batch or pages, rows, d)", have)
    k = kv_cache.unsqueeze(2) if kv_cache.dim() == 3 else kv_cache
    if k.shape[2] != 1:
        raise InvalidArgument(
            f"kv_cache has {k.shape[2]} heads", f"its shape is {tuple(kv_cache.shape)}", "MLA has one"
        )
    columns = arguments.integer("v_dim", v_dim)
    if not 0 < columns <= k.shape[3]:
        raise InvalidArgument(f"v_dim={columns}", f"a row of the cache has {k.shape[3]} columns")
    return flash_attn_with_kvcache(
        q, k, k[..., :columns], cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, page_table=page_table,
        cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, softmax_scale=scale, causal=causal,
        num_splits=num_splits, return_softmax_lse=return_lse, max_seqlen_k=max_seqlen_k, numerics=numerics,
    )  # fmt: skip
