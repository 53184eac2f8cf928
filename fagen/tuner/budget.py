"""What a run's time is spent on: problems share what is left, families a problem's part, final rounds come off it."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fagen import families
from fagen.codegen.spec import KernelSpec
from fagen.errors import FagenError, UsageError
from fagen.ops.base import Problem
from fagen.target import Target
from fagen.timing import load
from fagen.tuner import final_round
from fagen.tuner.search import portion

BUDGET_SECONDS = 300.0  # of a whole run, when neither budget nor trials are given
SEARCH_SHARE = 0.85  # of a problem's time, at most; the rest is for the final round
SHORTEST_FINAL = 0.4  # seconds, however small the budget is
_RECENT = 5  # final rounds that tell how long the next one takes
_START_SECONDS = {"cpu": 6.0, "gpu": 12.0}  # until a process that measures has torch and the device
_MEASURE_SECONDS = 3.0  # to verify and time a default
_CHILD_SECONDS = 1.0  # beside a compiler's own time
_FINAL_SECONDS = 2.0  # of a final round beside its timing: inputs, kernels to load, samples to calibrate


def duration(word: str) -> float:
    """Seconds of 90, 90s, 10m or 1h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", word.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{word!r} is no time", "times are seconds, or like 90s, 10m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


@dataclass(frozen=True)
class Least:
    """About how many seconds a problem's default needs to win: compiled, measured, and a final round held."""

    start: float  # of the first process, once a run
    compile: float  # 0: what is needed is built
    measure: float
    final: float

    @property
    def each(self) -> float:
        return self.compile + self.measure + self.final


def least(problem: Problem, target: Target, only: str | None = None, slowdown: float = 1.0) -> Least:
    """Of one problem, on a machine where everything takes `slowdown` times as long; families compile side by side."""
    from fagen.build import cache

    able, _ = families.searched(problem, target, only)
    compiles = [0.0]
    for family in able:
        try:
            built = cache.lookup(KernelSpec(family, problem, target, family.default(problem, target)))
        except FagenError:
            built = None
        compiles.append(0.0 if built else cache.expected_seconds(family, target) + _CHILD_SECONDS)
    start = _START_SECONDS["gpu" if target.is_gpu else "cpu"]
    measure, last = _MEASURE_SECONDS * max(1, len(able)), SHORTEST_FINAL + _FINAL_SECONDS
    return Least(start * slowdown, max(compiles) * slowdown, measure * slowdown, last * slowdown)


class Budget:
    """Of a whole run, in seconds since it began; None: no end."""

    def __init__(self, seconds: float | None, begun: float | None = None) -> None:
        self.total, self.started = seconds, time.monotonic() if begun is None else begun
        self.finals: list[float] = []  # seconds that final rounds took, all in all
        self.needs: dict[str, Least] = {}  # of problems, by key
        self._end = math.inf if seconds is None else self.started + seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    @property
    def ends(self) -> float:
        """When the run does, but for the final round that is due then."""
        return self._end

    def plan(self, problems: Sequence[Problem], target: Target, only: str | None = None) -> str:
        """Look at what the problems need at least, and what to tell of it: empty if the budget is enough.

        One problem is always served: where the budget is too short for that, the run takes as long as it needs.
        """
        if self.total is None or not problems:
            return ""
        slowdown = load.Slowdown()()
        self.needs = {p.key: least(p, target, only, slowdown) for p in problems}
        needs = [self.needs[p.key] for p in problems]
        alone, every = needs[0].start + needs[0].each, needs[0].start + sum(need.each for need in needs)
        if self.total - self.spent >= every:
            return ""
        self._end = max(self._end, time.monotonic() + alone)
        parts = f"{needs[0].start:.0f} s to start, then {needs[0].compile:.0f} s to compile its default, "
        parts += f"{needs[0].measure:.0f} s to measure it, {needs[0].final:.0f} s for a final round"
        said = f"{len(problems)} problems need about {every:.0f} s at least; the first one {alone:.0f} s: {parts}"
        short = f"a budget of {self.total:g} s is too short for"
        if self.total - self.spent < alone:
            return f"{short} any problem, so this run takes about {alone:.0f} s. {said}"
        return f"{short} all, and those that do not fit are left. {said}"

    def fits(self, problem: Problem) -> bool:
        """Whether a problem that is not the run's first can be served before the end."""
        need = self.needs.get(problem.key)
        return need is None or time.monotonic() + need.each <= self._end

    def among(self, problems: Sequence[Problem]) -> int:
        """How many of these, in their order, can share what is left. At least one."""
        left, count = self._end - time.monotonic(), 0
        for problem in problems:
            need = self.needs.get(problem.key)
            left -= need.each if need else 0.0
            count += left >= 0
        return max(1, count)

    def each(self, problems: int) -> float:
        """For each of the problems that are left."""
        if self.total is None:
            return math.inf
        return max(0.0, self._end - time.monotonic()) / problems

    def share(self, problems: int, families: int) -> Share:
        """Of the next problem, beside its final round: about as long as recent ones, or as the plan says."""
        planned = next((need.final for need in self.needs.values()), 0.0)
        took = statistics.median(self.finals[-_RECENT:]) if self.finals else planned
        return Share(lambda: self.each(problems), families, took)

    def of_final(self, planned: float) -> float:
        """For timing in the final round of a problem that was to take `planned` seconds."""
        return min(final_round.SECONDS, max(SHORTEST_FINAL, (1 - SEARCH_SHARE) * planned))


class Share:
    """A problem's part of the budget, counted from when it can first be measured; its families share what is left.

    `reserved` seconds are for its final round.
    """

    def __init__(self, seconds: Callable[[], float], families: int, reserved: float = 0.0) -> None:
        self.seconds, self.families, self.reserved = seconds, families, reserved
        self.end: float | None = None

    def deadline(self, turn: int) -> float:
        """When the search of the `turn`-th family ends."""
        now = time.monotonic()
        if self.end is None:
            seconds = self.seconds()
            self.end = now + max(0.0, min(SEARCH_SHARE * seconds, seconds - self.reserved))
        begun = portion(turn - 1, self.families) if turn else 0.0
        return now + max(0.0, self.end - now) * (portion(turn, self.families) - begun) / (1 - begun)
