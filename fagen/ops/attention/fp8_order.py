"""The order in which the fp8 kernels read v: see templates/include/fagen/sm90/forward_fp8/value_order.cuh."""

from __future__ import annotations

import torch

BLOCK_KEYS, CORE_KEYS, CORE_COLUMNS = 32, 16, 8


def key_in_place(place: int) -> int:
    """The key of a block that lies in a place of it: the one whose weight a lane of wgmma has for that place."""
    core, within = divmod(place, CORE_KEYS)
    lane, i = divmod(within, 4)
    return core * CORE_KEYS + lane * 2 + i % 2 + i // 2 * 8


def blocks(seqlen_k: int) -> int:
    return -(-seqlen_k // BLOCK_KEYS)


def order_values(v: torch.Tensor) -> torch.Tensor:
    """(batch, seqlen_k, kv_heads, dv) of one byte as (batch, kv_heads, blocks of 32 keys, dv, 32). dv is a multiple
    of 8. Places behind the last key are 0."""
    batch, keys, heads, columns = v.shape
    count = blocks(keys)
    padded = torch.nn.functional.pad(v.view(torch.uint8), (0, 0, 0, 0, 0, count * BLOCK_KEYS - keys))
    places = padded.view(batch, count, BLOCK_KEYS, heads, columns)[:, :, _keys(v.device)]
    cores = places.view(batch, count, BLOCK_KEYS // CORE_KEYS, CORE_KEYS, heads, columns // CORE_COLUMNS, CORE_COLUMNS)
    ordered = cores.permute(0, 4, 1, 5, 2, 6, 3).reshape(batch, heads, count, columns, BLOCK_KEYS)
    return ordered.view(v.dtype)


def rows_of_values(ordered: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    """The reverse."""
    batch, heads, count, columns, _ = ordered.shape
    groups = columns // CORE_COLUMNS
    cores = (
        ordered.contiguous()
        .view(torch.uint8)
        .view(batch, heads, count, groups, BLOCK_KEYS // CORE_KEYS, CORE_COLUMNS, CORE_KEYS)
    )
    places = cores.permute(0, 2, 4, 6, 1, 3, 5).reshape(batch, count, BLOCK_KEYS, heads, columns)
    rows = torch.empty_like(places)
    rows[:, :, _keys(ordered.device)] = places
    return rows.view(batch, count * BLOCK_KEYS, heads, columns)[:, :seqlen_k].contiguous().view(ordered.dtype)


def _keys(device: torch.device) -> torch.Tensor:
    return torch.tensor([key_in_place(place) for place in range(BLOCK_KEYS)], device=device)
