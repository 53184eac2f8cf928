"""The requests and answers that pass between the tuner and its workers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fagen.codegen.spec import KernelSpec
from fagen.target import Target
from fagen.timing.timer import Timing

if TYPE_CHECKING:
    from fagen.build.job import Artifact

OUTCOMES = ("ok", "constraint", "compile", "spill", "wrong", "crash", "timeout")


@dataclass(frozen=True)
class Result:
    """What became of a candidate: exactly one of OUTCOMES, and what is known about it."""

    outcome: str
    reason: str = ""
    timing: Timing | None = None
    error: float = 0.0
    artifact: Artifact | None = None
    took: float = 0.0  # seconds that verifying and timing took
    fatal: bool = False  # the process that measured it must not go on
    killed: bool = False  # its compiler was ended from outside: nothing is known of the candidate
    state: dict[str, Any] = field(default_factory=dict)  # of the GPU while it was timed, as nvml.py tells it
    remeasured: int = 0  # timings that were thrown away for their noise
    whole: bool = False  # timed in full, not given up early


@dataclass(frozen=True)
class CompileRequest:
    spec: KernelSpec
    timeout: float


@dataclass(frozen=True)
class ReferenceCandidate:
    """A candidate that was timed already. Others are timed in turn with it and told in its seconds, since a GPU's
    clock follows its power and temperature, and so differs from one minute of a run to the next."""

    spec: KernelSpec
    artifact: Artifact
    seconds: float


@dataclass(frozen=True)
class MeasureRequest:
    spec: KernelSpec
    artifact: Artifact
    seed: int = 0
    best: float = math.inf  # seconds of the best so far
    device: int = 0
    anchor: ReferenceCandidate | None = None

    @property
    def target(self) -> Target:
        return self.spec.target


@dataclass(frozen=True)
class Probe:
    """Does the device work? Asked of every fresh process, so that a broken device is not taken for bad candidates."""

    target: Target
    device: int = 0
    limits: bool = False  # measure also what the machine can do at most


@dataclass(frozen=True)
class Alive:
    limits: dict[str, float] = field(default_factory=dict)
    throttled: str = ""  # what holds the GPU back under load


@dataclass(frozen=True)
class FinalRequest:
    """Finalists of one problem under labels; the first is what all are timed beside."""

    entries: dict[str, tuple[KernelSpec, Artifact]]
    seed: int = 0
    device: int = 0
    seconds: float = 2.0

    @property
    def target(self) -> Target:
        return next(iter(self.entries.values()))[0].target


@dataclass(frozen=True)
class Final:
    timings: dict[str, Timing]
    notes: dict[str, str] = field(default_factory=dict)  # why a label has no timing, or how SDPA was asked
    state: dict[str, Any] = field(default_factory=dict)  # of the GPU
    rounds: int = 1  # the quietest of so many


TORCH = "torch"  # the label of PyTorch's SDPA, timed among the finalists


Request = MeasureRequest | FinalRequest | Probe
