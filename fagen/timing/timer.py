"""The clock, and the inputs that are timed and verified.

Times are medians over interleaved rounds: every candidate once a round, the order turned by one each round, so that a
drift of clocks or temperature falls on all alike. GPU samples are CUDA graph replays where a call can be captured,
else CUDA events around eager calls; the CPU has perf_counter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import truediv
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


Call = Callable[[], object]
LEAST_GAIN = 0.005  # below this no difference counts, however quiet the machine was
_SAMPLE_SECONDS = {"cpu": 2e-4, "cuda": 1e-3}  # calls are repeated in a sample until it lasts this long
_MOST_CALLS = 256  # in a sample
_FEW_CALLS = 8  # that hide the start of a graph
NOISY = 0.05  # a spread above this part of the median is worth another try


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: median, half the interquartile range, how many samples."""

    median: float
    spread: float
    samples: int

    @property
    def uncertainty(self) -> float:
        """Standard error of the median, were the samples normal."""
        return 1.86 * self.spread / math.sqrt(self.samples)

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        if len(samples) < 2:
            return cls(samples[0], 0.0, 1)
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(middle, (high - low) / 2, len(samples))


def quietest(measure: Callable[[], Timing], tries: int = 3, seconds: float = 1.5) -> tuple[Timing, int]:
    """A timing of small spread, else the quietest of `tries` more begun within `seconds`; and how many more."""
    best, again, until = measure(), 0, time.monotonic() + seconds
    while best.spread > NOISY * best.median and again < tries and time.monotonic() < until:
        best = min(best, measure(), key=lambda t: t.spread / t.median)
        again += 1
    return best, again


def beats(a: Timing, b: Timing) -> bool:
    """Whether a is faster than b by more than the noise of both."""
    noise = 2 * math.hypot(a.uncertainty, b.uncertainty)
    return b.median - a.median > max(noise, LEAST_GAIN * b.median)


def lost(seconds: float, spread: float, other: float) -> bool:
    """Whether a time that was kept is longer than another of the same round, beyond its noise; 0: there is no other."""
    return 0 < other < seconds - max(spread, LEAST_GAIN * seconds)


class RoundRobin:
    """One call that goes through several, one at a time: the same kernel on each set of inputs. They are called within
    a `session`, which is entered before the clock starts."""

    def __init__(
        self, calls: Sequence[Call], session: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self.count, self.session, self._turn = len(calls), session, itertools.cycle(calls)

    def __call__(self) -> object:
        return next(self._turn)()


# ---- the clock ------------------------------------------------------------------------------------------------------


class Sampler(Protocol):
    """Takes the seconds of one call, out of `calls` of them."""

    calls: int

    def sample(self) -> float: ...


class _CpuSampler:
    def __init__(self, call: Call) -> None:
        self.call, self.calls = call, 1

    def sample(self) -> float:
        with _session(self.call):
            start = time.perf_counter()
            for _ in range(self.calls):
                self.call()
            return (time.perf_counter() - start) / self.calls


class _GpuSampler:
    """`calls` calls in one graph replay where the call can be captured, else eagerly, between two events."""

    def __init__(self, call: Call) -> None:
        import torch

        self.call, self.calls = call, 1
        self.graph: torch.cuda.CUDAGraph | None = None
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def capture(self) -> None:
        """A graph of `calls` calls. Whatever cannot be captured is timed eagerly."""
        import torch

        graph = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings(), _session(self.call), torch.cuda.graph(graph):
                warnings.simplefilter("error")  # torch only warns of a graph that captured nothing
                for _ in range(self.calls):
                    self.call()
        except (RuntimeError, Warning):
            torch.cuda.synchronize()
            return
        self.graph = graph

    def sample(self) -> float:
        import torch

        torch.cuda.synchronize()
        with _session(self.call):
            self.start.record()
            if self.graph is not None:
                self.graph.replay()
            else:
                for _ in range(self.calls):
                    self.call()
            self.end.record()
            self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3 / self.calls


def _session(call: Call) -> AbstractContextManager[object]:
    session: Callable[[], AbstractContextManager[object]] = getattr(call, "session", nullcontext)
    return session()


def time_once(call: Call, *, device: torch.device | str) -> float:
    """Seconds of one call, roughly. Short calls of a GPU are captured, so that the host's time does not count."""
    sampler = sampler_of(call, device)
    seconds = sampler.sample()
    if isinstance(sampler, _GpuSampler) and seconds < _SAMPLE_SECONDS["cuda"]:
        sampler.calls = max(getattr(call, "count", 1), _FEW_CALLS)
        sampler.capture()
        seconds = sampler.sample()
    return seconds


def sampler_of(call: Call, device: torch.device | str) -> Sampler:
    return _GpuSampler(call) if str(device).startswith("cuda") else _CpuSampler(call)


def prepared(calls: Mapping[str, Call], device: torch.device | str, *, captured: bool = True) -> dict[str, Sampler]:
    """What times each of these calls: warm, and of so many calls a sample that it lasts long enough.

    Those that are not `captured` into graphs are timed eagerly, the host's part included.
    """
    least = _SAMPLE_SECONDS["cuda" if str(device).startswith("cuda") else "cpu"]
    samplers = {name: sampler_of(call, device) for name, call in calls.items()}
    for name, sampler in samplers.items():
        sampler.sample()  # warm
        wanted = math.ceil(least / max(sampler.sample(), 1e-9))
        sampler.calls = max(getattr(calls[name], "count", 1), min(_MOST_CALLS, wanted))
        if captured and isinstance(sampler, _GpuSampler):
            sampler.capture()
            sampler.sample()
    return samplers


def time_calls(
    calls: Mapping[str, Call],
    *,
    device: torch.device | str,
    rounds: int = 7,
    min_seconds: float = 0.0,
    max_seconds: float = math.inf,
    captured: bool = True,
) -> dict[str, Timing]:
    """Time calls against each other: at least `rounds` rounds, more until `min_seconds` are spent in all.

    `max_seconds` ends it earlier, but not before three rounds.
    """
    samplers = prepared(calls, device, captured=captured)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), time.perf_counter()
    for turn in itertools.count():
        spent = time.perf_counter() - start
        if (turn >= rounds and spent >= min_seconds) or (turn >= 3 and spent >= max_seconds):
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(samplers[name].sample())
    return against_each_other(samples)


def against_each_other(samples: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    """The timings of calls that took turns. What slowed all of a round, as a clock that drifts, is not their noise."""
    several = len(samples)
    if several == 1:
        return {name: Timing.of(values) for name, values in samples.items()}
    medians = [statistics.median(values) for values in samples.values()]
    level = [statistics.median(map(truediv, times, medians)) for times in zip(*samples.values(), strict=True)]
    own = math.sqrt(several / (several - 1))  # each has a part in the level
    steady = {name: Timing.of(list(map(truediv, values, level))) for name, values in samples.items()}
    return {name: dataclasses.replace(timing, spread=own * timing.spread) for name, timing in steady.items()}
