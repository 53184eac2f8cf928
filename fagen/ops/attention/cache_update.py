"""New keys and values of sequences, written to a cache in place; rotary embedding of them and of q. Plain torch:
nothing is read on the host, so that CUDA graphs and torch.compile hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_LARGEST_E4M3 = 448.0
_NOWHERE = -(1 << 30)  # a number of a row that makes its position negative


@dataclass(frozen=True, eq=False)
class Places:
    """Where in the cache each new row belongs: a page, and a row in it. No page, where the table has none."""

    pages: torch.Tensor
    rows: torch.Tensor

    def write(self, cache: torch.Tensor, new: torch.Tensor) -> None:
        """Rows (batch, new, kv_heads, dim), or packed ones, of the cache's dtype."""
        if cache.dtype.itemsize == 1:  # indexing by tensors does not know fp8
            cache, new = cache.view(torch.uint8), new.view(torch.uint8)
        cache.index_put_((self.pages, self.rows), new)


@dataclass(frozen=True, eq=False)
class NewRows:
    """New rows of a batch: the number of each in its sequence, (batch, rows), or packed (rows) with their sequences.

    A server appends at every step, so that what is not needed is not computed: `number` is None for one row each.
    """

    number: torch.Tensor | None
    sequence: torch.Tensor | None = None

    @classmethod
    def padded(cls, rows: int, device: torch.device) -> NewRows:
        return cls(None if rows == 1 else torch.arange(rows, device=device))

    @classmethod
    def packed(cls, starts: torch.Tensor, rows: int) -> NewRows:
        """Of rows one sequence behind the other, the first of each at `starts`. Rows behind the last have no place."""
        row = torch.arange(rows, device=starts.device, dtype=starts.dtype)
        sequence = torch.bucketize(row, starts[1:].contiguous(), right=True).clamp(max=starts.shape[0] - 2)
        return cls(torch.where(row < starts[-1], row - starts[sequence], _NOWHERE), sequence)

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """Each row's of a tensor (batch, ...)."""
        return t[:, None] if self.sequence is None else t[self.sequence]

    def behind(self, lengths: torch.Tensor) -> torch.Tensor:
        """The position of each row in a sequence that had these lengths before."""
        return self.of(lengths) if self.number is None else self.of(lengths) + self.number

    def places(
        self, positions: torch.Tensor, cache: torch.Tensor, table: torch.Tensor | None, index: torch.Tensor | None
    ) -> Places:
        """A negative entry would count from the end of the cache: it becomes one that torch refuses to write to."""
        size, none = cache.shape[1], cache.shape[0]
        if table is None:
            everyone = torch.arange(none, device=cache.device) if index is None else index
            found = self.of(everyone[: positions.shape[0]] if self.sequence is None else everyone)
            found = torch.where((found < 0) | (positions < 0), none, found)
            return Places(found.long(), positions.long())
        pages = positions // size
        if self.sequence is None:
            found = table.gather(1, pages.long())  # which refuses what lies outside
        else:
            found = torch.where(positions < 0, -1, table[self.sequence, pages])
        return Places(torch.where(found < 0, none, found).long(), (positions % size).long())


def rotate(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """The first columns of each head turned by the angles of its position: pairs of neighbours, or of halves.

    x is (..., heads, head_dim), `positions` (...), `cos` and `sin` (positions, half of the columns).
    """
    half = cos.shape[-1]
    c, s = (t[positions.long()].float()[..., None, :] for t in (cos, sin))
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = first * c - second * s, second * c + first * s
    made = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([made.to(x.dtype), rest], dim=-1)


def quantized(x: torch.Tensor, scale: torch.Tensor | None, rows: NewRows, dtype: torch.dtype) -> torch.Tensor:
    """Rows as the cache holds them: over their scale (batch, kv_heads), at most the largest number of fp8."""
    if x.dtype == dtype:
        return x
    wide = x.float() if scale is None else x.float() / rows.of(scale)[..., None]
    return wide.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(dtype)
