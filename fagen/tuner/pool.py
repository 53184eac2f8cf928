"""The workers of a run and the loop that keeps them busy: compilers run ahead, one process measures.

On a GPU both go on at once. On the CPU a running compiler would spoil the times, so they take turns: a batch is
compiled, then measured.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.errors import MissingTool
from fagen.problem import Problem
from fagen.target import Target
from fagen.tuner import candidate as steps
from fagen.tuner.candidate import Candidate, CompileRequest, Final, FinalRequest, MeasureRequest, Result
from fagen.tuner.search import Pace, Search
from fagen.tuner.workers import Death, Worker

if TYPE_CHECKING:
    from fagen.build import Artifact
    from fagen.families import Config

TICK = 0.2  # seconds between looks at the clock
SETTLE_SECONDS = 10.0  # that compilers get to finish before a round that must be quiet
BATCH = 2  # candidates a compiler gets in a turn, on the CPU
_SLOW = {"cpu": 1e9, "gpu": 5e11}  # FLOP/s below which a kernel of unknown speed counts as hung
_STAGED_SECONDS = 3.0  # of timing, once it is known how long a call takes

Done = Callable[[Candidate, Result], None]


class Pool:
    """Compile workers and the measuring worker of one target."""

    def __init__(
        self,
        target: Target,
        log: Path,
        *,
        workers: int,
        seed: int,
        device: int,
        compile_timeout: float,
        run_timeout: float,
    ) -> None:
        self.target, self.seed, self.device = target, seed, device
        self.compile_timeout, self.run_timeout = compile_timeout, run_timeout
        self.compilers = [Worker(steps.compile_one, log) for _ in range(workers)]
        self.measurer = Worker(steps.measure_any, log, steps.import_torch)
        self.ready: deque[tuple[Candidate, Artifact]] = deque()
        self._default: Config | None = None  # of the search that is under way
        self._artifacts: dict[Candidate, Artifact] = {}
        self.pace = Pace()
        self._turn = 0  # candidates handed to compilers since the last measurement, on the CPU

    def __enter__(self) -> Pool:
        self.measurer.start()  # its imports go on while the first candidates are compiled
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in (*self.compilers, self.measurer):
            worker.kill()

    @property
    def compiling(self) -> int:
        return sum(worker.busy for worker in self.compilers)

    @property
    def measuring(self) -> Candidate | None:
        return self.measurer.job if self.measurer.busy else None

    # ---- the search ---------------------------------------------------------------------------------------------

    def explore(self, search: Search, deadline: float, done: Done, over: Callable[[], bool]) -> None:
        """Evaluate what the search hands out until it has no more, the deadline passes or `over()`.

        A measurement that runs at the deadline is awaited; what is being compiled then is forgotten. The default is
        measured before any other that is ready, and however short the time is: the winner must beat it.
        """
        self.ready.clear()
        space, exhausted = search.space, False
        self._default = space.family.default(space.problem, space.target)
        while not over():
            late = time.monotonic() > deadline and self._default in search.seen
            if not late:
                exhausted = self._feed_compilers(search)
                self._feed_measurer(search)
            if not self.measurer.busy and (late or (exhausted and not self.compiling and not self.ready)):
                break
            self._collect(done)
        if over() and self.measurer.busy:
            self.measurer.kill()
        for worker in self.compilers:
            worker.job = None
        self.ready.clear()

    def _feed_compilers(self, search: Search) -> bool:
        """Hand out candidates; True when the search has no more."""
        quiet = not self.target.is_gpu
        if quiet and (self.measurer.busy or (self.ready and not self.compiling)):
            return False
        if not self.compiling:
            self._turn = 0
        for worker in self.compilers:
            full = self._turn >= BATCH * len(self.compilers)
            if not quiet:
                full = self.compiling + len(self.ready) >= self.pace.ahead(len(self.compilers))
            if worker.busy or full:
                continue
            config = search.next()
            if config is None:
                return True
            self._turn += 1
            item = Candidate(search.space.family.name, search.space.problem, self.target, config)
            # the worker's own limit is a little longer than the compiler's, which gives the better message
            worker.send(CompileRequest(item, self.compile_timeout), self.compile_timeout + 30, item)
        return False

    def _feed_measurer(self, search: Search) -> None:
        if self.measurer.busy or not self.ready or (self.compiling and not self.target.is_gpu):
            return
        item, artifact = self.ready.popleft()
        request = MeasureRequest(item, artifact, self.seed, search.bar, self.device)
        self.measurer.send(request, self.run_timeout + self._estimate(item.problem, search.best), item)

    def _estimate(self, problem: Problem, best: float) -> float:
        """Seconds that a right but slow candidate may need."""
        a_call = problem.flops() / _SLOW["gpu" if self.target.is_gpu else "cpu"]
        return _STAGED_SECONDS + 2 * min(a_call, 50 * best)

    def _collect(self, done: Done) -> None:
        for worker, reply in self._replies([*self.compilers, self.measurer]):
            item, result = worker.job, _result(reply, worker is self.measurer)
            worker.job = None
            if result.fatal:
                worker.kill()
            if item is None:  # of a search that is over
                continue
            if worker is not self.measurer and result.outcome == "ok" and result.artifact:
                put = self.ready.appendleft if item.config == self._default else self.ready.append
                put((item, result.artifact))
                self._artifacts[item] = result.artifact
                self.pace.compiled(float(result.artifact.facts.get("compile_seconds", 0)))
            else:
                if result.took:
                    self.pace.measured(result.took)
                done(item, replace(result, artifact=result.artifact or self._artifacts.get(item)))

    def _replies(self, workers: Iterable[Worker]) -> list[tuple[Worker, Any]]:
        """Wait a moment; who has something to say, and what."""
        busy = [worker for worker in workers if worker.busy]
        connection.wait([thing for worker in busy for thing in worker.waits_on], timeout=TICK)
        return [(worker, reply) for worker in busy if (reply := worker.poll()) is not None]

    # ---- the final round ----------------------------------------------------------------------------------------

    def built(self, items: Iterable[Candidate]) -> dict[Candidate, Artifact]:
        """The kernels of these candidates; those of an earlier run are built again, from the cache most often."""
        found = {}
        for item in items:
            artifact = self._artifacts.get(item)
            if artifact is None:
                worker = self._free_compiler()
                worker.send(CompileRequest(item, self.compile_timeout), self.compile_timeout + 30, item)
                reply: Any = None
                while reply is None:
                    reply = next((reply for _, reply in self._replies([worker])), None)
                artifact = _result(reply, False).artifact
            if artifact is not None:
                found[item] = self._artifacts[item] = artifact
        return found

    def _free_compiler(self) -> Worker:
        worker = next((w for w in self.compilers if not w.busy), self.compilers[0])
        if worker.busy:
            worker.kill()
        return worker

    def final(self, entries: dict[str, tuple[Candidate, Artifact]], seconds: float, slowest: float) -> Final | str:
        """Time finalists against each other, or say why that failed twice."""
        if not self.target.is_gpu:
            self._settle()
        request = FinalRequest(entries, self.seed, self.device, seconds)
        limit = self.run_timeout + 60 + 2 * seconds + 10 * slowest * len(entries)
        why = ""
        for _ in range(2):
            self.measurer.send(request, limit)
            reply: Any = None
            while reply is None:
                reply = next((reply for _, reply in self._replies([self.measurer])), None)
            if isinstance(reply, Final):
                return reply
            self.measurer.kill()
            why = reply.reason if isinstance(reply, Death) else f"{type(reply).__name__}: {reply}"
        return why

    def _settle(self) -> None:
        """Let compilers finish what nobody waits for any more, or end it."""
        until = time.monotonic() + SETTLE_SECONDS
        while self.compiling and time.monotonic() < until:
            self._replies(self.compilers)
        for worker in self.compilers:
            if worker.busy:
                worker.kill()


def _result(reply: Any, measured: bool) -> Result:
    """What a worker's answer, exception or death means for the candidate."""
    if isinstance(reply, Result):
        return reply
    if isinstance(reply, MissingTool):
        raise reply
    if isinstance(reply, Death):
        return Result("timeout" if reply.timed_out else "crash" if measured else "compile", reply.reason)
    return Result("crash" if measured else "compile", f"{type(reply).__name__}: {reply}", fatal=measured)
