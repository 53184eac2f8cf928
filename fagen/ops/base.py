"""An op: everything that is not the same for all of them. The rest of fagen asks the op, and knows none by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from fagen.errors import UnsupportedProblem

if TYPE_CHECKING:
    import ctypes

    import torch

    from fagen.ops.inputs import Inputs
    from fagen.ops.oracle import Verdict
    from fagen.target import Target

    Outputs = Mapping[str, torch.Tensor]

Constant = tuple[str, str, str, str]  # C++ type, name, value, comment


class Problem(Protocol):
    """What a caller asks for. An op's problem is a frozen dataclass whose constructor validates.

    `static_key` has all that changes the source, `size_key` what only matters for tuning, `key` both.
    """

    @property
    def op(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def static_key(self) -> str: ...
    @property
    def size_key(self) -> str: ...
    @property
    def key(self) -> str: ...
    def __hash__(self) -> int: ...
    def bytes(self) -> int:
        """Memory of a call's inputs and outputs."""

    def flops(self) -> float: ...
    def replace(self, **changes: Any) -> Self: ...
    def to_dict(self) -> dict[str, Any]: ...
    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """Raises InvalidArgument for what `to_dict` has not made."""


class Call(Protocol):
    """The arguments of one call. An op's call is a frozen dataclass."""

    @property
    def problem(self) -> Any: ...
    def check_tensors(self) -> None:
        """Raises InvalidArgument for tensors that contradict each other."""

    def inputs(self) -> dict[str, torch.Tensor]:
        """All tensors that are read, by name. The first one tells the device."""

    def output_types(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each output that a kernel can fill, by name."""


@dataclass(frozen=True)
class Calls:
    """The part of an op that handles tensors: its calls, how they are made, launched and checked.

    Outputs go by name. `variants` are the sets of them that a caller may ask for: all of them first, and last the set
    that is timed.
    """

    variants: tuple[tuple[str, ...], ...]
    params: Callable[[Any, Outputs], ctypes.Structure]  # of a launch: a call and its outputs, as `Op.header` has them
    # raises InvalidArgument for a sound call, and outputs of its types, that a kernel of the problem would read astray
    require: Callable[[Any, Any, Outputs], None]
    # of a problem on a device, by a seed; `varied`: as different from row to row as the problem allows, to verify with
    inputs: Callable[[Any, Any, int, bool], Inputs]
    check_problems: Callable[[Any, Target], list[Any]]  # where kernels go wrong; last the problem itself, made small
    check: Callable[[Any, Outputs], Verdict]  # of the outputs that are there
    check_sample: Callable[[Any, Outputs], Verdict]  # the same for sizes at which to check all would take too long
    # PyTorch on the same call and how it is asked; None and why, where it cannot
    torch_peer: Callable[[Any], tuple[Callable[[], object] | None, str]]
    # of a problem's call: its own mask may leave fewer cells than the problem says
    flops: Callable[[Any, Any], float] = field(default=lambda problem, call: float(problem.flops()))

    @property
    def timed(self) -> tuple[str, ...]:
        return self.variants[-1]


def _no_calls() -> Calls:
    raise UnsupportedProblem("kernels of this op cannot be called from Python", "they can be emitted")


def one_regime(problem: Any, target: Target) -> int:
    """For `Op.regime`: any record may serve any size."""
    return 0


@dataclass(frozen=True)
class Op:
    """One kind of computation."""

    name: str
    title: str  # in words, for people who read a kernel
    problem: type[Any]  # a Problem; its first field, `op`, is the op's name
    header: str  # the params of a launch in plain C, below templates/include
    constants: Callable[[Any], list[Constant]]  # what the source is told of the problem
    features: Callable[[Any, int], dict[str, float]]  # of a size point on so many units, in doublings
    weights: Mapping[str, float]  # how much each feature counts
    flags: Callable[[Any], list[str]]  # how the command line spells a problem
    torch_serves: Callable[[Any], bool]  # whether PyTorch computes it as fast as it can, without a detour
    # of a size on a device: a record serves sizes of its own regime alone
    regime: Callable[[Any, Target], int] = field(default=one_regime)
    length: str = ""  # the attribute of a problem by which those of a series differ
    least_bytes: Callable[[Any], int] = field(default=lambda problem: int(problem.bytes()))  # that any kernel moves
    symbols: tuple[str, ...] = ()  # lines for people who read a kernel, at its head
    enums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of C++, that the constants use
    calls: Callable[[], Calls] = field(default=_no_calls)  # imports torch, so it is asked for when it is needed
    example_names: Callable[[Any], dict[str, Any]] = field(default=lambda problem: {})  # that its template asks for
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
