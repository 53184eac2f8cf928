"""What a run is asked for, what comes of it, and the rule that decides a winner."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fagen import ops
from fagen.codegen.spec import KernelSpec
from fagen.db.record import Record
from fagen.errors import INTERRUPTED, NoCandidate
from fagen.families.space import Fixed
from fagen.target import Target
from fagen.timing import timer
from fagen.timing.timer import Timing

DEFAULT, INCUMBENT = "default", "incumbent"


@dataclass(frozen=True)
class Options:
    budget: float | None = None  # seconds of the whole run
    trials: int | None = None  # candidates for each problem
    seed: int = 0
    workers: int | None = None  # compilers at a time; None: as many as cores and memory bear
    devices: tuple[int, ...] = (0,)  # a measuring process for each; the first one decides
    compile_timeout: float = 120.0
    run_timeout: float = 10.0
    resume: Path | str | None = None  # a run's folder, or "latest"
    family: str | None = None  # search this one alone
    storage: str | None = None  # URL of a database in which any number of processes share their studies
    grace: float = 60.0  # seconds of silence after which one of those counts as dead
    out: Path | None = None  # where the winners go; None: the user's overlay
    runs: Path | None = None  # where runs are kept; None: the user's state folder
    fixed: Fixed = field(default_factory=dict)  # choices that some knobs are restricted to
    sampler: str = "guided"  # of search.SAMPLERS
    cold: bool = False  # begin without the database's winners and the family's guesses
    exhaustive: bool = False  # every legal config, each measured in full
    begun: float | None = None  # moment of time.monotonic from which the budget counts; None: now


@dataclass
class Tuned:
    """What came of one problem: plain data, as in winners.jsonl and --json. Times in seconds, None if not measured."""

    problem: dict[str, Any]
    complete: bool  # False: the search was interrupted
    outcomes: dict[str, int]
    family: str = ""
    config: dict[str, Any] | None = None
    seconds: float | None = None
    spread: float | None = None
    error: float | None = None
    default_config: dict[str, Any] | None = None
    default_seconds: float | None = None
    incumbent_seconds: float | None = None
    torch_seconds: float | None = None
    torch_mode: str = ""
    device: dict[str, Any] = field(default_factory=dict)  # the GPU's clocks, power and temperature in the final round
    rounds: int = 1  # final rounds that were held: more than one where they were noisy
    why: str = ""  # why this config won, or why none did

    @property
    def key(self) -> str:
        return ops.problem_from(self.problem).key

    @property
    def is_default(self) -> bool:
        return self.config is not None and self.config == self.default_config and self.seconds == self.default_seconds

    @property
    def gain(self) -> str:
        """Against the default, in words: nothing below 1.00x stands without its reason."""
        if self.is_default:
            return "the default itself"
        if not self.speedup:
            return "the default was not timed"
        return f"{self.speedup:.2f}x the default" + (", a tie within the noise" if self.speedup < 1.005 else "")

    @property
    def behind(self) -> str:
        """Where PyTorch was faster."""
        if self.torch_seconds and self.seconds and timer.lost(self.seconds, self.spread or 0.0, self.torch_seconds):
            return f"PyTorch is faster: {self.torch_seconds * 1e3:.4g} ms against {self.seconds * 1e3:.4g} ms"
        return ""

    @property
    def speedup(self) -> float | None:
        return self.default_seconds / self.seconds if self.seconds and self.default_seconds else None


@dataclass
class Report:
    run: Path
    target: Target
    results: list[Tuned] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)  # the winners that this run has written
    written: list[Path] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # keys of problems that the budget had no time for
    interrupted: bool = False

    @property
    def failed(self) -> list[Tuned]:
        """Problems without a winner."""
        return [tuned for tuned in self.results if not tuned.config]

    @property
    def exit_code(self) -> int:
        """Of a run that had problems, and no winner for any: an error. What else is missing is said."""
        if self.interrupted:
            return INTERRUPTED
        return NoCandidate.exit_code if self.results and len(self.failed) == len(self.results) else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "target": dataclasses.asdict(self.target),
            "interrupted": self.interrupted,
            "written": [str(path) for path in self.written],
            "failed": [tuned.key for tuned in self.failed],
            "left": self.left,
            "results": [{"key": t.key, "speedup": t.speedup, **dataclasses.asdict(t)} for t in self.results],
        }


def choose(timings: dict[str, Timing], labels: dict[str, KernelSpec]) -> tuple[str, str]:
    """The winner's label and why: it beats default and incumbent by more than the noise, ties go by a stable rule."""
    held = [label for label in (INCUMBENT, DEFAULT) if label in labels]
    able = [label for label in labels if all(timer.beats(timings[label], timings[h]) for h in held if h != label)]
    challengers = [label for label in able if label not in held]
    if not challengers and held:
        if len(held) == 2 and timer.beats(timings[DEFAULT], timings[INCUMBENT]):
            return DEFAULT, "the default beats the incumbent, and nothing beats the default by more than the noise"
        return held[0], f"nothing beats the {held[0]} by more than the noise"
    best = min(challengers, key=lambda label: timings[label].median)
    ties = [label for label in challengers if not timer.beats(timings[best], timings[label])]

    def rank(label: str) -> tuple[Any, str]:
        item = labels[label]
        return item.family.resources(item.problem, item.target, item.config), item.config.to_json()

    winner = min(ties, key=rank) if len({labels[label].family for label in ties}) == 1 else best
    return winner, f"the fewest resources of {len(ties)} within the noise" if len(ties) > 1 else "the fastest"
