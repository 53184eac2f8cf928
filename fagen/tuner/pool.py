"""The workers of a run and the loop that keeps them busy: compilers run ahead, one process a device measures.

On a GPU both go on at once. On the CPU a running compiler would spoil the times, so they take turns: a batch is
compiled, then measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.build.compilers import COMPILE_BYTES, free_memory
from fagen.codegen.spec import KernelSpec
from fagen.errors import FagenError
from fagen.ops.base import Problem
from fagen.target import Target
from fagen.tuner import evaluate as steps
from fagen.tuner.answers import line, result_of
from fagen.tuner.messages import (
    Alive,
    CompileRequest,
    Final,
    FinalRequest,
    MeasureRequest,
    Probe,
    ReferenceCandidate,
    Result,
)
from fagen.tuner.patience import Patience
from fagen.tuner.search import Pace, Search
from fagen.tuner.workers import Death, Worker

if TYPE_CHECKING:
    from fagen.build.job import Artifact
    from fagen.families import Config

TICK = 0.2  # seconds between looks at the clock
SETTLE_SECONDS = 10.0  # that compilers get to finish before a round that must be quiet
BATCH = 2  # candidates a compiler gets in a turn, on the CPU
PROBES = 3  # that fail, then the device is given up
_OOM = {"compiler": 800, "measurer": 400}  # what the system ends first when memory runs out

Done = Callable[[KernelSpec, Result], None]


@dataclass
class _Probing:
    """A fresh process is asked whether its device works; only then is the one before it blamed on its candidate."""

    suspect: tuple[KernelSpec, Result] | None = None
    failures: int = 0


class Pool:
    """Compile workers, and a measuring worker for each device. `note` hears what a person should know."""

    def __init__(
        self,
        target: Target,
        log: Path,
        *,
        workers: int,
        seed: int,
        devices: Sequence[int] = (0,),
        compile_timeout: float,
        run_timeout: float,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.target, self.seed, self.note = target, seed, note
        self.patience = Patience(target, compile_timeout, run_timeout)
        self.quiet = not target.is_gpu  # nothing compiles while something is timed
        self.compilers = [Worker(steps.compile_one, log, oom=_OOM["compiler"]) for _ in range(workers)]
        self.devices = {
            Worker(steps.measure_any, log, steps.import_torch, oom=_OOM["measurer"]): device for device in devices
        }
        self.ready: deque[tuple[KernelSpec, Artifact]] = deque()
        self.ahead: deque[KernelSpec] = deque()  # of the next search: built when this one has no more use for compilers
        self.until = math.inf  # when the search that is under way ends; inf until something can be measured
        self.ends = math.inf  # when the whole run does, however little was found
        self.limits: dict[str, float] = {}  # what the machine can do at most, if it was measured
        self._allowed = workers  # compilers at a time: fewer after one was ended for want of memory
        self._rank: Callable[[Config], int] = lambda config: 0  # which of those that are ready is measured first
        self._needed: Callable[[Config], bool] = lambda config: False  # whether a winner must beat it
        self._again: deque[KernelSpec] = deque()  # whose compiler was ended from outside
        self._retried: set[KernelSpec] = set()
        self._artifacts: dict[KernelSpec, Artifact] = {}
        self._anchor: ReferenceCandidate | None = (
            None  # what times on a GPU go by; one for all devices, each at its own clock
        )
        self.pace = Pace()
        self._turn = 0  # candidates handed to compilers since the last measurement, on the CPU
        self._compiled = 0  # answers of compilers in this search
        self._alive: set[Worker] = set()
        self._seconds: deque[float] = deque(maxlen=50)  # of recent compilations

    def __enter__(self) -> Pool:
        for number, worker in enumerate(self.devices):  # imports go on while the first candidates are compiled
            self._probe(worker, _Probing(), limits=number == 0)
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in (*self.compilers, *self.devices):
            worker.kill()

    @property
    def compiling(self) -> int:
        return sum(worker.busy for worker in self.compilers)

    @property
    def measuring(self) -> dict[int, KernelSpec]:
        """What is being measured, by device."""
        return {d: w.job for w, d in self.devices.items() if w.busy and isinstance(w.job, KernelSpec)}

    # ---- the search ---------------------------------------------------------------------------------------------

    def explore(self, search: Search, deadline: Callable[[], float], done: Done, over: Callable[[], bool]) -> None:
        """Evaluate what the search hands out until it has no more, the deadline passes or `over()`.

        `deadline` is asked for once something can be measured: the wait for the first process and the first kernel
        is on nobody's account. A measurement that runs at the deadline is awaited; what is being compiled then is
        forgotten. The default and the incumbent are measured before any other that is ready, and after the deadline
        as well, until the run itself `ends`: the winner must beat them.
        """
        exhausted, self.until, self._compiled = False, math.inf, 0
        self._rank, self._needed = search.rank, search.needs
        self.ready.clear()
        self._again.clear()
        while not (over() or self.ended):
            if self.until == math.inf and self._compiled and self._alive:
                self.until = deadline()
            late = time.monotonic() > self.until and not search.lacking
            if not late:
                exhausted = self._feed_compilers(search)
                self._feed_measurers(search)
            if not self._measurers_busy and (late or (exhausted and not self._underway)):
                break
            self._collect(done)
        until = time.monotonic() + (0 if over() else SETTLE_SECONDS)
        while self.measuring and time.monotonic() < until:
            self._collect(done)
        for worker in self.devices:
            if worker.busy:
                worker.kill()
        for worker in self.compilers:
            worker.job = None
        self.ready.clear()

    @property
    def ended(self) -> bool:
        return time.monotonic() > self.ends

    @property
    def _underway(self) -> bool:
        return bool(self.ready or self._again or any(worker.busy and worker.job for worker in self.compilers))

    @property
    def _measurers_busy(self) -> bool:
        return any(worker.busy for worker in self.devices)

    def _feed_compilers(self, search: Search) -> bool:
        """Hand out candidates; True when the search has no more."""
        if self.quiet and (self._measurers_busy or (self.ready and not self.compiling)):
            return False
        if not self.compiling:
            self._turn = 0
        for worker in self.compilers:
            full = self._turn >= BATCH * len(self.compilers)
            if not self.quiet:
                full = self.compiling + len(self.ready) >= self.pace.ahead(len(self.compilers), len(self.devices))
            if worker.busy or full:
                continue
            if not self._room():
                break
            if self._too_late(search):
                self.build_ahead()
                break
            config = self._again[0].config if self._again else search.next()
            if config is None:
                return not search.waiting
            item = KernelSpec(search.space.family, search.space.problem, self.target, config)
            if self._again:
                self._again.popleft()
            self._turn += 1
            self._compile(worker, item, item)
        return False

    def _compile(self, worker: Worker, item: KernelSpec, job: KernelSpec | None) -> None:
        # the worker's own limit is a little longer than the compiler's, which gives the better message
        limit = self.patience.compiling(item)
        worker.send(CompileRequest(item, limit), limit + 30, job)
        worker.since = time.monotonic()

    def _room(self) -> bool:
        """Whether one more compiler finds memory. One always may run."""
        if not self.compiling:
            return True
        least = COMPILE_BYTES["gpu" if self.target.is_gpu else "cpu"]
        return self.compiling < self._allowed and free_memory() >= least

    def _too_late(self, search: Search) -> bool:
        """Whether even a quick compilation would end after the search."""
        if self.quiet or not self._seconds or search.lacking:
            return False
        quick = statistics.quantiles([*self._seconds, self._seconds[-1]], n=4)[0]
        return time.monotonic() + quick > self.until

    def build_ahead(self) -> None:
        """Let idle compilers build what the next search will ask for first. Not where that spoils a time."""
        for worker in self.compilers:
            if self.quiet or not self.ahead or not self._room():
                return
            if not worker.busy:
                self._compile(worker, self.ahead.popleft(), None)

    def _feed_measurers(self, search: Search) -> None:
        if self.quiet and self.compiling:
            return
        for worker, device in self.devices.items():
            if worker.busy or not self.ready:
                continue
            anchor = self._anchor_for(search.space.problem)
            if self.target.is_gpu and anchor is None and self.measuring:  # the others wait for the first to be one
                return
            item, artifact = self.ready.popleft()
            request = MeasureRequest(item, artifact, self.seed, search.bar, device, anchor)
            worker.send(request, self.patience.measuring(item, search.best), item)

    def _anchor_for(self, problem: Problem) -> ReferenceCandidate | None:
        return self._anchor if self._anchor and self._anchor.spec.problem == problem else None

    # ---- answers ------------------------------------------------------------------------------------------------

    def _collect(self, done: Done) -> None:
        for worker, reply in self._replies([*self.compilers, *self.devices]):
            job, worker.job = worker.job, None
            if worker in self.devices:
                self._hear_measurer(worker, job, reply, done)
            else:
                self._hear_compiler(worker, job, reply, done)

    def _hear_compiler(self, worker: Worker, item: KernelSpec | None, reply: Any, done: Done) -> None:
        result = result_of(reply, False)
        if result.outcome == "ok" and result.artifact:
            self.pace.compiled(float(result.artifact.facts.get("compile_seconds", 0)))
            self._seconds.append(time.monotonic() - worker.since)
        if item is None:  # built ahead, or of a search that is over
            return
        self._compiled += 1
        if result.killed and item not in self._retried:
            self._retried.add(item)
            self._again.append(item)
            self._allowed = max(1, min(self._allowed, len(self.compilers)) - 1)
            self.note(f"a compiler was ended from outside; at most {self._allowed} at a time from here on")
        elif self._second_chance(item, result):
            self._again.append(item)
        elif result.outcome == "ok" and result.artifact:
            before = sum(self._rank(other.config) <= self._rank(item.config) for other, _ in self.ready)
            self.ready.insert(before, (item, result.artifact))
            self._artifacts[item] = result.artifact
        else:
            done(item, result)

    def _hear_measurer(self, worker: Worker, job: KernelSpec | _Probing | None, reply: Any, done: Done) -> None:
        if isinstance(job, _Probing):
            self._hear_probe(worker, job, reply, done)
            return
        result = result_of(reply, True)
        if result.fatal:
            worker.kill()
        if result.took:
            self.pace.measured(result.took)
        if job is None:
            return
        artifact = self._artifacts.get(job)
        if self.target.is_gpu and result.whole and artifact and self._anchor_for(job.problem) is None:
            assert result.timing is not None
            self._anchor = ReferenceCandidate(job, artifact, result.timing.median)
        device = self.devices[worker]
        state = {**result.state, "gpu": device} if len(self.devices) > 1 else result.state
        result = replace(result, artifact=result.artifact or artifact, state=state)
        if artifact and self._second_chance(job, result):
            self.ready.appendleft((job, artifact))
            self._probe(worker, _Probing())
        elif result.fatal:
            self._probe(worker, _Probing((job, result)))
        else:
            done(job, result)

    def _second_chance(self, item: KernelSpec, result: Result) -> bool:
        if not self._needed(item.config) or not self.patience.once_more(item, result):
            return False
        self.note(f"what a winner must beat ended in {result.outcome} ({line(result.reason)}); it is tried once more")
        return True

    def _probe(self, worker: Worker, probing: _Probing, limits: bool = False) -> None:
        self._alive.discard(worker)
        worker.send(Probe(self.target, self.devices[worker], limits), self.patience.probing(), probing)

    def _hear_probe(self, worker: Worker, probing: _Probing, reply: Any, done: Done) -> None:
        if isinstance(reply, Alive):
            self._alive.add(worker)
            self.limits = reply.limits or self.limits
            if reply.throttled:
                self.note(reply.throttled)
        else:
            worker.kill()
            probing.failures += 1
            if probing.failures < PROBES:
                self._probe(worker, probing)
                return
        if probing.suspect:
            done(*probing.suspect)
        if not isinstance(reply, Alive):
            self._give_up(worker, reply)

    def _give_up(self, worker: Worker, reply: Any) -> None:
        """A device that does not work even in a fresh process. The run goes on where there is another."""
        device = self.devices.pop(worker)
        why = reply.reason if isinstance(reply, Death) else str(reply).splitlines()[0]
        if not self.devices:
            raise FagenError(
                f"{self.target.device} (device {device}) does not work any more",
                f"{PROBES} fresh processes failed at a small product: {why}",
                "fagen doctor may say why; what was measured is kept: go on with --resume",
            )
        self.note(f"device {device} does not work any more and is given up: {why}")

    def _replies(self, workers: Iterable[Worker]) -> list[tuple[Worker, Any]]:
        """Wait a moment; who has something to say, and what."""
        busy = [worker for worker in workers if worker.busy]
        connection.wait([thing for worker in busy for thing in worker.waits_on], timeout=TICK)
        return [(worker, reply) for worker in busy if (reply := worker.poll()) is not None]

    # ---- the final round ----------------------------------------------------------------------------------------

    def built(self, items: Iterable[KernelSpec]) -> dict[KernelSpec, Artifact]:
        """The kernels of these candidates; those of an earlier run are built again, from the cache most often."""
        found = {}
        for item in items:
            artifact = self._artifacts.get(item)
            if artifact is None:
                worker = self._free_compiler()
                self._compile(worker, item, None)
                reply: Any = None
                while reply is None:
                    reply = next((reply for _, reply in self._replies([worker])), None)
                artifact = result_of(reply, False).artifact
            if artifact is not None:
                found[item] = self._artifacts[item] = artifact
        return found

    def _free_compiler(self) -> Worker:
        worker = next((w for w in self.compilers if not w.busy), self.compilers[0])
        if worker.busy:
            worker.kill()
        return worker

    def final(self, entries: dict[str, tuple[KernelSpec, Artifact]], seconds: float, slowest: float) -> Final | str:
        """Time finalists against each other on one device, or say why that failed twice."""
        while self._measurers_busy:  # a process that starts
            self._collect(lambda item, result: None)
        if self.quiet:
            self._settle()
        worker, device = next(iter(self.devices.items()))
        request = FinalRequest(entries, self.seed, device, seconds)
        limit = self.patience.final(len(entries), seconds, slowest)
        why = ""
        for _ in range(2):
            worker.send(request, limit)
            reply: Any = None
            while reply is None:
                reply = next((reply for _, reply in self._replies([worker])), None)
            if isinstance(reply, Final):
                return reply
            worker.kill()
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
