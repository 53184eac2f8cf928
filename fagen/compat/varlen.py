"""FlashAttention 2's `flash_attn_varlen_func`: sequences packed one behind the other, as column intervals."""

from __future__ import annotations

from typing import Any

import torch

from fagen import api
from fagen.api import Descale
from fagen.compat.flash_attn import window_bounds
from fagen.errors import InvalidArgument, UnsupportedProblem
from fagen.ops.attention import arguments, masks
from fagen.ops.attention.arguments import is_plain
from fagen.runtime import packed


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    descale_q: Descale = None,
    descale_k: Descale = None,
    descale_v: Descale = None,
    descale_block: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Layout (total length, heads, head_dim); causal and window aligned bottom-right within each sequence.

    Sequence i has rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q, and keys likewise; lengths of zero are fine. Pass
    one tensor as both where they are the same: then fewer bounds are read, and ALiBi is served. The largest lengths are
    not needed. The bounds are made at every call, by one kernel; `fagen.masks.from_cu_seqlens` makes them once for many
    calls of `fagen.attention`. With `return_attn_probs`: (out, softmax_lse, None), the LSE (heads, total length of q).

    q, k and v may be of fp8, as `fagen.quantize_qkv` makes them of q[None], k[None] and v[None]; v has its order then,
    or is of rows. Their descales are those of all sequences, a batch of one, and those of blocks count rows from the
    first sequence's on.
    """
    if block_table is not None:
        raise UnsupportedProblem("paged keys are not supported", "", "pass block_table=None and contiguous k, v")
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        arguments.integer(name, bound)
    _check_packs(q, k, v)
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_lengths(name, t, q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise InvalidArgument("cu_seqlens_q and cu_seqlens_k name as many sequences", f"{len(cu_seqlens_q)} and "
                              f"{len(cu_seqlens_k)} numbers")  # fmt: skip
    want_probs, causal = arguments.flag("return_attn_probs", return_attn_probs), arguments.flag("causal", causal)
    same = cu_seqlens_q is cu_seqlens_k and q.shape[0] == k.shape[0]
    if alibi_slopes is not None and not same:
        raise UnsupportedProblem(
            "ALiBi of packed sequences needs rows and keys of the same lengths",
            "cu_seqlens_q and cu_seqlens_k are two tensors", "pass one tensor as both if they are equal",
        )  # fmt: skip
    masks_of = packed_masks(q, k, cu_seqlens_q, cu_seqlens_k, causal, window_bounds(window_size))
    result = api.attention(
        q[None], k[None], v[None] if v.dim() == 3 else v, **masks_of, softcap=softcap, alibi_slopes=alibi_slopes,
        scale=softmax_scale, return_lse=want_probs, deterministic=deterministic, dropout_p=dropout_p,
        descale_q=descale_q, descale_k=descale_k, descale_v=descale_v, descale_block=descale_block,
    )  # fmt: skip
    if isinstance(result, torch.Tensor):
        return result[0]
    return result[0][0], result[1][0], None


def _check_packs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """A v of fp8 may be in the order of the kernels, that of a batch of one."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        arguments.dense(name, t)
        ordered = name == "v" and t.dim() == 5 and t.dtype == torch.float8_e4m3fn
        if t.dim() != 3 and not ordered:
            raise InvalidArgument(f"{name} must have shape (total, heads, head_dim)", f"it has {tuple(t.shape)}")


def _check_lengths(name: str, cu_seqlens: Any, device: torch.device) -> None:
    arguments.dense(name, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        has = f"it is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise InvalidArgument(f"{name} must be int32 (sequences + 1)", has)
    if cu_seqlens.device != device:
        raise InvalidArgument(f"{name} is on {cu_seqlens.device}", f"q is on {device}")


def packed_masks(
    q: torch.Tensor, k: torch.Tensor, of_q: torch.Tensor, of_k: torch.Tensor, causal: bool,
    bounds: tuple[int | None, int | None],
) -> dict[str, Any]:  # fmt: skip
    """The arguments of `attention` that keep packed sequences apart. Where rows and keys are the same, the band of the
    whole is that of each sequence."""
    rows, keys = q.shape[0], k.shape[0]
    if of_q is of_k and rows == keys:
        intervals = _intervals(of_q, of_k, rows, keys, 1 if causal else 2)
        return {"causal": causal, "window": bounds, "intervals": intervals}
    left, right = bounds[0], 0 if causal else bounds[1]
    return {"intervals": _intervals(of_q, of_k, rows, keys, 2, left, right)}


def _intervals(
    of_q: torch.Tensor, of_k: torch.Tensor, rows: int, keys: int, columns: int, left: int | None = None,
    right: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """By one kernel, where there is one and its address may be taken; a compiler fuses what PyTorch computes."""
    plain = keys > 0 and is_plain(of_q) and is_plain(of_k)
    library = packed.library_for(of_q, of_k) if plain else None
    if library is not None:
        made = packed.make_intervals(library, of_q, of_k, rows, keys, columns, left, right)
        if made is not None:
            return made
    both = masks.from_cu_seqlens(of_q, of_k, rows, keys, left=left, right=right)
    return both[..., :1].contiguous() if columns == 1 else both
