"""What a run's time is spent on: problems share what is left, families a problem's part, final rounds come off it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

from fagen.tuner import final
from fagen.tuner.search import portion

SEARCH_SHARE = 0.85  # of a problem's time, at most; the rest is for the final round
SHORTEST_FINAL = 0.4  # seconds, however small the budget is
_RECENT = 5  # final rounds that tell how long the next one takes


class Budget:
    """Of a whole run, in seconds from now on; None: no end."""

    def __init__(self, seconds: float | None) -> None:
        self.total, self.started = seconds, time.monotonic()
        self.finals: list[float] = []  # seconds that final rounds took, all in all

    def each(self, problems: int) -> float:
        """For each of the problems that are left."""
        if self.total is None:
            return math.inf
        return max(0.0, self.total - (time.monotonic() - self.started)) / problems

    def share(self, problems: int, families: int) -> Share:
        """Of the next problem, beside its final round."""
        took = statistics.median(self.finals[-_RECENT:]) if self.finals else 0.0
        return Share(lambda: self.each(problems), families, took)

    def of_final(self, planned: float) -> float:
        """For timing in the final round of a problem that was to take `planned` seconds."""
        return min(final.SECONDS, max(SHORTEST_FINAL, (1 - SEARCH_SHARE) * planned))


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
