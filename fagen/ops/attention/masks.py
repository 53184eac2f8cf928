"""Makers of FlashMask interval vectors, and the dense mask that every other code path is checked against.

Intervals are int32 (batch, 1 or kv_heads, seqlen_k, columns); per key column, the query rows that are masked OUT:
  1 column, or causal with 1:  rows >= c0
  2 columns, causal:           c0 <= row < c1
  2 columns, not causal:       rows >= c0 and rows < c1
  4 columns:                   c0 <= row < c1 and c2 <= row < c3
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fagen.errors import InvalidArgument

if TYPE_CHECKING:
    import torch


def interval_kind(columns: int, causal: bool) -> str:
    """The static name of what the columns mean (see `problem.INTERVAL_KINDS`)."""
    kinds = {(1, True): "lower1", (1, False): "lower1", (2, True): "lower2", (2, False): "both2"}
    kinds |= {(4, True): "both4", (4, False): "both4"}
    if (columns, causal) not in kinds:
        raise InvalidArgument(f"intervals have {columns} columns", "they may have 1, 2 or 4")
    return kinds[columns, causal]


def from_documents(ids: torch.Tensor, *, causal: bool = True) -> torch.Tensor:
    """Rows and columns of the same document see each other. `ids` is int (batch, seqlen), equal ids adjacent."""
    import torch

    if ids.dim() != 2:
        raise InvalidArgument(f"document ids have {ids.dim()} dimensions", "they must be (batch, seqlen)")
    batch, length = ids.shape
    position = torch.arange(length, device=ids.device).expand(batch, length)
    change = torch.ones_like(ids, dtype=torch.bool)
    change[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = torch.where(change, position, 0).cummax(dim=1).values
    last = torch.ones_like(change)
    last[:, :-1] = change[:, 1:]
    end = torch.where(last, position + 1, length).flip(1).cummin(dim=1).values.flip(1)
    columns = [end] if causal else [end, start]
    return torch.stack(columns, dim=-1)[:, None].to(torch.int32).contiguous()


def from_cu_seqlens(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, seqlen_q: int, seqlen_k: int, *,
    causal: bool = False, left: int | None = None, right: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Sequences packed one behind the other: a row sees the keys of its own, within its own band. Not causal.

    Sequence i has rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] and keys likewise. `causal` and the bounds `left` and
    `right` of a window are aligned bottom-right within each, whose rows and keys may differ in number. Nothing waits
    for a device.
    """
    import torch

    key = torch.arange(seqlen_k, device=cu_seqlens_k.device)
    sequence = torch.searchsorted(cu_seqlens_k[1:].to(torch.int64), key, right=True)  # a key behind the last is in none
    rows, keys = (torch.cat([cu, cu[-1:]]).to(torch.int64) for cu in (cu_seqlens_q, cu_seqlens_k))
    start, end = rows[sequence], rows[sequence + 1]
    diagonal = end - (keys[sequence + 1] - key)  # the row whose diagonal the key lies on
    right = 0 if causal else right
    if right is not None:
        start = torch.maximum(start, diagonal - right)
    if left is not None:
        end = torch.minimum(end, diagonal + left + 1)
    # LTS and UTE: rows from `end` on and before `start` do not see the key
    start, end = start.clamp(0, seqlen_q), end.clamp(0, seqlen_q)
    return torch.stack([end, torch.minimum(start, end)], dim=-1)[None, None].to(torch.int32).contiguous()


def from_prefix(prefix: torch.Tensor | list[int], seqlen_q: int, seqlen_k: int | None = None) -> torch.Tensor:
    """Prefix LM: keys before `prefix[b]` are seen by all rows, later keys causally (bottom-right). Not causal."""
    import torch

    prefix = torch.as_tensor(prefix)
    seqlen_k = seqlen_k or seqlen_q
    key = torch.arange(seqlen_k, device=prefix.device)
    first_row = (key - (seqlen_k - seqlen_q)).clamp(min=0, max=seqlen_q)  # rows before it do not see the key
    upper_end = torch.where(key[None] < prefix[:, None], 0, first_row[None])
    lower_start = torch.full_like(upper_end, seqlen_q)
    return torch.stack([lower_start, upper_end], dim=-1)[:, None].to(torch.int32).contiguous()


def from_window(
    left: int | None, right: int | None, batch: int, seqlen_q: int, seqlen_k: int | None = None, device: str = "cpu"
) -> torch.Tensor:
    """The sliding window as intervals, to be mixed with others. Not causal."""
    import torch

    seqlen_k = seqlen_k or seqlen_q
    row = torch.arange(seqlen_k, device=device) - (seqlen_k - seqlen_q)  # the row on the key's diagonal
    none_below, none_above = torch.full_like(row, seqlen_q), torch.zeros_like(row)
    lower = none_below if left is None else (row + left + 1).clamp(0, seqlen_q)
    upper = none_above if right is None else (row - right).clamp(0, seqlen_q)
    return torch.stack([lower, upper], dim=-1)[None, None].expand(batch, 1, -1, -1).to(torch.int32).contiguous()


def dense(
    seqlen_q: int,
    seqlen_k: int,
    *,
    window: tuple[int, int] = (-1, -1),
    intervals: torch.Tensor | None = None,
    kind: str = "",
    rows: slice = slice(None),
    keys: slice = slice(None),
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Bool (batch or 1, mask heads or 1, rows, keys), True where the cell is visible. Small sizes only."""
    import torch

    row = torch.arange(seqlen_q, device=device)[rows, None]
    col = torch.arange(seqlen_k, device=device)[None, keys]
    diagonal = row + (seqlen_k - seqlen_q)
    seen = torch.ones(row.shape[0], col.shape[1], dtype=torch.bool, device=device)
    if window[0] >= 0:
        seen &= col >= diagonal - window[0]
    if window[1] >= 0:
        seen &= col <= diagonal + window[1]
    seen = seen[None, None]
    if intervals is None:
        return seen
    from fagen.ops.attention.problem import INTERVAL_KINDS

    bounds = {name: intervals[:, :, None, keys, i] for i, name in enumerate(INTERVAL_KINDS[kind])}
    below = row >= bounds["LTS"]
    if "LTE" in bounds:
        below &= row < bounds["LTE"]
    if "UTE" in bounds:
        above = row < bounds["UTE"]
        if "UTS" in bounds:
            above &= row >= bounds["UTS"]
        below = below | above
    return seen & ~below
