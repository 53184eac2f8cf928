"""The call that a tracer will ask for when its graph runs: its tensors have no memory, and its sizes may be symbols."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fagen.ops.attention.call import AttentionCall

_TENSORS = ("q", "k", "v", "intervals", "alibi_slopes")


@dataclass(frozen=True)
class _Described:
    """As much of a tensor as a call's problem follows from. Its memory begins at an aligned address, as that of a new
    one does."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def stride(self, axis: int | None = None) -> Any:
        return self.strides if axis is None else self.strides[axis]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        return 0


def described(call: AttentionCall) -> AttentionCall | None:
    """The call with the numbers that its symbols stood for when they were made; None where there are none."""
    fields: dict[str, Any] = {}
    for name in _TENSORS:
        t = getattr(call, name)
        if t is None:
            continue
        shape, strides = _numbers(t.shape), _numbers(t.stride())
        if shape is None or strides is None or 0 in shape:
            return None
        fields[name] = _Described(shape, strides, t.dtype, t.device)
    return dataclasses.replace(call, **fields)


def _numbers(sizes: Iterable[Any]) -> tuple[int, ...] | None:
    """Without a guard: the graph must not be traced anew because of them."""
    found = []
    for size in sizes:
        if not isinstance(size, int) and not size.node.has_hint():
            return None
        found.append(size if isinstance(size, int) else int(size.node.hint))
    return tuple(found)
