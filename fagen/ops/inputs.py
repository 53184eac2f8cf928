"""The inputs of a call that is timed and verified, for every op: guards around the outputs, sums over what is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fagen.target import Target

if TYPE_CHECKING:
    import torch

_MOST_SETS = 32  # of inputs
_MOST_BYTES = 2 << 30  # of all input sets together
GUARD_BYTES = 4096  # before and behind each output
_SENTINEL = -1536.0  # what nobody may overwrite; exact in every dtype


class Guarded(NamedTuple):
    """An output and the memory around it."""

    shown: torch.Tensor
    memory: torch.Tensor


@dataclass(frozen=True)
class Inputs:
    """A call, and room for its outputs by name. Remembers what no kernel may change. `of` makes it."""

    call: Any
    outputs: dict[str, torch.Tensor]
    _memory: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # of each output, guards and all
    _sums: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # of each tensor that the call reads

    @classmethod
    def of(cls, call: Any, outputs: Mapping[str, Guarded]) -> Inputs:
        """`call.inputs()` are all tensors that it reads, by name."""
        shown, memory = ({name: pair[i] for name, pair in outputs.items()} for i in (0, 1))
        return cls(call, shown, memory, {name: _bits(t) for name, t in call.inputs().items()})

    def change(self, **fields: Any) -> Inputs:
        """Other arguments of the call, with the same outputs."""
        call, before = dataclasses.replace(self.call, **fields), self.call.inputs()
        sums = {n: self._sums[n] if t is before.get(n) else _bits(t) for n, t in call.inputs().items()}
        return dataclasses.replace(self, call=call, _sums=sums)

    def damage(self) -> str:
        """What a kernel wrote where it must not: into what it reads, or beside its outputs. Empty if it did not."""
        read = self.call.inputs()
        changed = [f"wrote into its input {name}" for name, bits in self._sums.items() if _bits(read[name]) != bits]
        beside = [f"wrote outside of {n}" for n, memory in self._memory.items() if not _intact(self.outputs[n], memory)]
        return " and ".join(changed + beside)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pitch: int | None = None) -> Guarded:
    """An output full of NaN: sentinels before, behind, and between rows that show less than the `pitch` they hold.

    A tensor made in inference mode, or inside an op, does not know its base.
    """
    import torch

    guard, pitch = GUARD_BYTES // dtype.itemsize, shape[-1] if pitch is None else pitch
    held = *shape[:-1], pitch
    memory = torch.full((math.prod(held) + 2 * guard,), _SENTINEL, dtype=dtype, device=device)
    return Guarded(memory[guard:-guard].view(held)[..., : shape[-1]].fill_(math.nan), memory)


def _bits(t: torch.Tensor) -> torch.Tensor:
    """The sum of all bits of a tensor's memory, whatever they mean; sums of integers have no order."""
    import torch

    memory = t.new_empty(0).set_(t.untyped_storage()).view(torch.uint8)
    whole = memory.numel() // 8 * 8
    return memory[:whole].view(torch.int64).sum() + memory[whole:].sum()


def _intact(t: torch.Tensor, memory: torch.Tensor) -> bool:
    guard = GUARD_BYTES // t.element_size()
    between = memory[guard:-guard].view(*t.shape[:-1], -1)[..., t.shape[-1] :]
    return all(bool((part == _SENTINEL).all()) for part in (memory[:guard], memory[-guard:], between))


def input_sets(problem: Any, target: Target) -> int:
    """How many sets of inputs to take in turn, so that a GPU's L2 does not hold what the next call reads."""
    size = problem.bytes()
    if not target.is_gpu or size >= 3 * target.l2:
        return 1
    return max(1, min(-(-3 * target.l2 // size), _MOST_SETS, _MOST_BYTES // size))
