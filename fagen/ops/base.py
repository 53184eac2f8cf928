"""An op: everything that is not the same for all of them. The rest of fagen asks the op, and knows none by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Constant = tuple[str, str, str, str]  # C++ type, name, value, comment


@dataclass(frozen=True)
class Op:
    """One kind of computation. `problem` is a frozen dataclass whose first field, `op`, is the op's name.

    A problem has `static_key`, `size_key`, `key`, `replace`, `to_dict`, `from_dict`, `bytes`, `flops`, `dtype`. Its
    constructor validates.
    """

    name: str
    title: str  # in words, for people who read a kernel
    problem: type[Any]
    header: str  # the params of a launch in plain C, below templates/include
    constants: Callable[[Any], list[Constant]]  # what the source is told of the problem
    features: Callable[[Any, int], dict[str, float]]  # of a size point on so many units, in doublings
    weights: Mapping[str, float]  # how much each feature counts
    flags: Callable[[Any], list[str]]  # how the command line spells a problem
    torch_serves: Callable[[Any], bool]  # whether PyTorch computes it as fast as it can, without a detour
    example: str = ""  # the template of a program that runs an emitted kernel; none: there is no such program

    def differences(self, a: Any, b: Any, units: int) -> dict[str, float]:
        """How far two size points are apart on a device of so many units, in weighted doublings of each feature."""
        others = self.features(b, units)
        return {name: self.weights[name] * abs(x - others[name]) for name, x in self.features(a, units).items()}

    def distance(self, a: Any, b: Any, units: int) -> float:
        """The sum of the differences; 0 where two size points differ in nothing that counts."""
        total = 0.0
        for difference in self.differences(a, b, units).values():  # C++ adds so, too; sum() rounds otherwise
            total += difference
        return total
