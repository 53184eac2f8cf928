"""How long things may take before they count as hung, and what gets a second chance.

Limits grow with the machine's load: what is slow only because others compute meanwhile is no bad candidate. What a
winner must beat is tried once more, with more time, before its problem is given up.
"""

from __future__ import annotations

from fagen.codegen.spec import KernelSpec
from fagen.ops.base import Problem
from fagen.target import Target
from fagen.timing import load
from fagen.tuner.messages import Result

PROBE_SECONDS = 60.0  # that a device may take to say that it works
_SLOW = {"cpu": 1e9, "gpu": 5e11}  # FLOP/s below which a kernel of unknown speed counts as hung
_STAGED_SECONDS = 6.0  # of timing, noise and cooling included, once it is known how long a call takes
_SECOND = 3.0  # times the first limit
RETRIED = ("timeout", "crash")  # what may be the fault of the machine


class Patience:
    def __init__(self, target: Target, compile_timeout: float, run_timeout: float) -> None:
        self.target, self.compile_timeout, self.run_timeout = target, compile_timeout, run_timeout
        self.slowdown = load.Slowdown()
        self._second: set[KernelSpec] = set()

    def _stretched(self, seconds: float, item: KernelSpec | None = None) -> float:
        return seconds * self.slowdown() * (_SECOND if item in self._second else 1.0)

    def compiling(self, item: KernelSpec) -> float:
        return self._stretched(self.compile_timeout, item)

    def measuring(self, item: KernelSpec, best: float) -> float:
        """`best`: seconds of a call of the best so far."""
        return self._stretched(self.run_timeout + self._estimate(item.problem, best), item)

    def probing(self) -> float:
        return self._stretched(PROBE_SECONDS)

    def final(self, count: int, seconds: float, slowest: float) -> float:
        """Of a final round of so many configs, which may be held three times."""
        return self._stretched(self.run_timeout + 60 + 6 * seconds + 40 * slowest * (count + 1))

    def _estimate(self, problem: Problem, best: float) -> float:
        """Seconds that a right but slow candidate may need."""
        a_call = problem.flops() / _SLOW["gpu" if self.target.is_gpu else "cpu"]
        return _STAGED_SECONDS + 2 * min(a_call, 50 * best)

    def once_more(self, item: KernelSpec, result: Result) -> bool:
        """Whether a candidate that a winner must beat, and that ended so, shall be tried again. Once each."""
        if result.outcome not in RETRIED or item in self._second:
            return False
        self._second.add(item)
        return True
