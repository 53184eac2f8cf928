"""What defaults look at of a size, as tests that the C++ table makes, too, for calls of a new size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fagen.target import Target


class Test(Protocol):
    """As `ops/attention/measures.AtMost`."""

    @property
    def words(self) -> tuple[int, int, int]:
        """For the table in C++."""

    def holds(self, problem: Any, target: Target) -> bool: ...


@dataclass(frozen=True)
class Reads:
    """For `Family.default_reads`: tests that are the same for all sizes of a static key."""

    tests: Callable[[Any, Target], Sequence[Test]]

    def __call__(self, problem: Any, target: Target) -> tuple[bool, ...]:
        return self.of_sizes(problem, target)(problem)

    def of_sizes(self, problem: Any, target: Target) -> Callable[[Any], tuple[bool, ...]]:
        """The same for every size of the problem's static key, whose tests are made once."""
        tests = tuple(self.tests(problem, target))
        return lambda sized: tuple(test.holds(sized, target) for test in tests)


nothing = Reads(lambda problem, target: ())  # the default is the same for all sizes
