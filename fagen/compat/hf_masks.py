"""The masks of transformers as arguments of `fagen.attention`. Imported by `hf.register` alone: needs transformers.

transformers describes a mask by a function of indices. The usual ones are known by name; another one is evaluated, a
block of keys at a time, and written as the run of rows that sees each key. Where that cannot be said exactly, the mask
stays a dense tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import and_masks, bidirectional_mask_function, causal_mask_function, sdpa_mask

from fagen.ops.attention import masks

_CELLS = 1 << 25  # of a mask that are evaluated at a time
_AND = and_masks(causal_mask_function).__code__  # of every mask that is an intersection


class ColumnMask(BlockMask):
    """Which keys each row sees: the mask arguments of `fagen.attention` on the first `keys` keys. No row sees others.

    A BlockMask, since transformers hands those on as they are; but nothing of one is in it.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        keys: int,
        *,
        causal: bool = False,
        window: int | None = None,
        intervals: torch.Tensor | None = None,
    ) -> None:
        self._shape = shape  # (batch, 1, rows, keys) as transformers counts them
        self.keys = keys
        self.causal = causal  # aligned bottom-right on `keys`
        self.window = window  # keys before the diagonal that a row sees
        self.intervals = intervals

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def everything(self) -> bool:
        return not self.causal and self.window is None and self.intervals is None and self.keys == self._shape[3]

    def options(self, device: torch.device) -> dict[str, Any]:
        """The arguments of `fagen.attention`."""
        intervals = self.intervals if self.intervals is None else self.intervals.to(device)
        return {"causal": self.causal, "window": (self.window, None), "intervals": intervals}

    def dense(self) -> torch.Tensor:
        """Bool (batch or 1, 1, rows, keys): True where a row sees a key."""
        intervals = self.intervals
        kind = "" if intervals is None else masks.interval_kind(intervals.shape[3], self.causal)
        bounds = (-1 if self.window is None else self.window, 0 if self.causal else -1)
        device = "cpu" if intervals is None else intervals.device
        seen = masks.dense(
            self._shape[2], self.keys, window=bounds, intervals=intervals, kind=kind, device=device
        )  # fmt: skip
        return torch.nn.functional.pad(seen, (0, self._shape[3] - self.keys))

    def __getitem__(self, index: Any) -> torch.Tensor:  # type: ignore[override]
        return self.dense()[index]

    def to(self, device: torch.device | str, **_: Any) -> ColumnMask:
        moved = None if self.intervals is None else self.intervals.to(device)
        return ColumnMask(self._shape, self.keys, causal=self.causal, window=self.window, intervals=moved)

    def __repr__(self) -> str:
        of = None if self.intervals is None else tuple(self.intervals.shape)
        return f"ColumnMask({self._shape}, {self.keys}, causal={self.causal}, window={self.window}, intervals={of})"

    __str__ = __repr__


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> ColumnMask | torch.Tensor:
    """What transformers asks of an AttentionMaskInterface. A tensor, dense and bool, where columns cannot say it."""
    tracing = torch.compiler.is_compiling()
    shape = (batch_size, 1, q_length, kv_length)
    if isinstance(q_offset, torch.Tensor) and not tracing and q_length > 1:
        q_offset = int(q_offset)  # not while decoding: a number would be another one in each step of a compiled model
    padding = _padding(attention_mask, kv_length, kv_offset)
    if padding is not None and not tracing and bool(padding.all()):
        padding = None
    known = padding is None or padding.dim() == 2
    if known and mask_function is bidirectional_mask_function:
        return ColumnMask(shape, kv_length, intervals=_hidden(padding, q_length))
    window = _sliding_window(local_size, config) if allow_is_causal_skip else None
    if known and (mask_function is causal_mask_function or window is not None):
        return _banded(shape, q_offset, kv_offset, window, padding, device)

    def evaluate(first: int, keys: int) -> torch.Tensor:
        """Bool (batch, 1, rows, keys) of some keys, by transformers' own hand."""
        seen = sdpa_mask(
            batch_size, q_length, keys, q_offset, kv_offset + first, mask_function, attention_mask,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        assert seen is not None
        return seen

    if q_length == 1:  # one row: whatever it sees can be said
        return ColumnMask(shape, kv_length, intervals=evaluate(0, kv_length)[:, :, 0, :, None].to(torch.int32))
    if 0 in shape or (tracing and (use_vmap or getattr(mask_function, "__code__", None) is not _AND)):
        return evaluate(0, kv_length)  # whether columns can say it depends on values, which a graph does not know
    if tracing:  # packed sequences and chunks, which they can
        first, end, whole = _run(evaluate(0, kv_length))
        torch._assert_async(
            whole, "fagen: a key is seen by rows that lie apart, which needs a dense mask: do not compile"
        )
        return ColumnMask(shape, kv_length, intervals=_runs(first, end))
    columns = _evaluated(shape, evaluate)
    return evaluate(0, kv_length) if columns is None else columns


def _padding(attention_mask: torch.Tensor | None, kv_length: int, kv_offset: int) -> torch.Tensor | None:
    """Bool (batch, keys) of the keys that are attended; those behind the mask's end are not."""
    if attention_mask is None or attention_mask.dim() != 2:
        return attention_mask
    more = kv_length + kv_offset - attention_mask.shape[-1]
    if more > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, more))
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def _hidden(padding: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """Intervals of one column: no row sees the padding."""
    return None if padding is None else (padding.to(torch.int32) * rows)[:, None, :, None]


def _sliding_window(local_size: int | None, config: Any) -> int | None:
    """The window of a mask that is causal and local, and nothing else; a chunked one is local in another way."""
    if local_size is None or getattr(config, "attention_chunk_size", None) is not None:
        return None
    return local_size if local_size == getattr(config, "sliding_window", None) else None


def _banded(
    shape: tuple[int, int, int, int],
    q_offset: int | torch.Tensor,
    kv_offset: int,
    window: int | None,
    padding: torch.Tensor | None,
    device: torch.device | str,
) -> ColumnMask:
    """Causal, within a window of so many keys or without one, and with padding."""
    rows, keys = shape[2:]
    if not isinstance(q_offset, torch.Tensor):
        last = q_offset + rows - kv_offset  # no row sees a key from here on: a static cache has more
        if 1 <= last <= keys:
            hidden = None if padding is None else _hidden(padding[:, :last], rows)
            left = window - 1 if window is not None and window < last else None
            return ColumnMask(shape, last, causal=rows > 1, window=left, intervals=hidden)
    first = torch.arange(keys, device=device) + (kv_offset - q_offset)  # the row on the key's diagonal
    end = torch.full_like(first, rows) if window is None else (first + window).clamp(0, rows)
    ends = end[None] if padding is None else torch.where(padding, end, 0)
    return ColumnMask(shape, keys, intervals=_runs(first.clamp(0, rows).expand_as(ends), ends))


def _runs(first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Intervals of two columns, not causal: rows from `first` to before `end` see the key."""
    return torch.stack([end, first], dim=-1)[:, None].to(torch.int32)


def _run(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each key the first row that sees it and the row behind the last one; whether all rows between see it too."""
    seen, rows = seen[:, 0], seen.shape[2]
    row = torch.arange(rows, dtype=torch.int32, device=seen.device)[:, None]
    first, end = torch.where(seen, row, rows).amin(1), torch.where(seen, row + 1, 0).amax(1)
    return first, end, ((end - first).clamp(min=0) == seen.sum(1)).all()


def _evaluated(shape: tuple[int, int, int, int], evaluate: Callable[[int, int], torch.Tensor]) -> ColumnMask | None:
    """The mask by the run of rows that sees each key; None where more than one run does."""
    batch, _, rows, keys = shape
    firsts: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    step = max(1, _CELLS // (batch * rows))
    for at in range(0, keys, step):
        some = _run(evaluate(at, min(step, keys - at)))
        for parts, part in zip((firsts, ends, whole), some, strict=True):
            parts.append(part)
    first, end = torch.cat(firsts, 1), torch.cat(ends, 1)
    key = torch.arange(1, keys + 1, device=first.device)
    in_runs, last = torch.stack([torch.stack(whole).all().long(), torch.where(end > 0, key, 1).amax()]).tolist()
    if not in_runs:
        return None
    first, end = first[:, :last], end[:, :last]
    diagonal = (key[:last] - 1 + rows - last).clamp(min=0)
    if bool(((first == diagonal) | (end == 0)).all()):
        return ColumnMask(shape, last, causal=True, intervals=end[:, None, :, None].contiguous())
    return ColumnMask(shape, last, intervals=_runs(first, end))
