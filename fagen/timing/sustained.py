"""Times in the state in which people run: hot, and for longer than a clock needs to follow its load.

A GPU at its power limit runs each kernel at the clock that this kernel's own power allows, and takes milliseconds to
get there. Short calls that take turns are all timed at the clock of the mixture, and each at what the one before it
left: a kernel that follows a cool one looks faster than it is. Here every call runs in bouts of its own, the first half
of which only brings the clock to where it stays, with a bout of one common reference before and after it. What counts
is the ratio to those two in each round: a clock that drifts falls on all three. The spread of the ratios is the noise.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING

from fagen.timing import timer
from fagen.timing.timer import Call, Sampler, Timing

if TYPE_CHECKING:
    import torch

BOUT_SECONDS = 0.04  # of one call without a break, the first half of which is not counted
ROUNDS = 7  # that shorter bouts make room for
LEAST_ROUNDS = 3  # however long the calls take
_WARM_SHARE = 0.25  # of all seconds, at most, until the reference's time stands still
_WARM_SECONDS = 0.1  # of a bout of the warm-up
_STILL = 0.01  # part of the time by which two bouts may differ when the clock has settled


def time_calls(
    calls: Mapping[str, Call], reference: str, *, device: torch.device | str, seconds: float, seed: int = 0
) -> dict[str, Timing]:
    """Time calls beside one of them for about so many seconds. The reference takes part as any other does.

    Each round has an order of its own. Times are ratios to the reference, in the reference's seconds.
    """
    samplers = timer.prepared(calls, device)
    begin, beside = time.perf_counter(), samplers[reference]
    _warm(beside, _WARM_SHARE * seconds)
    bouts = ROUNDS * (2 * len(calls) + 1)
    length = min(BOUT_SECONDS, (1 - _WARM_SHARE) * seconds / bouts)
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    known, names, chance, rounds = [_bout(beside, length)], list(calls), Random(seed), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - begin < seconds:
        for name in chance.sample(names, len(names)):
            took = _bout(samplers[name], length)
            known.append(_bout(beside, length))
            ratios[name].append(2 * took / (known[-2] + known[-1]))
        rounds += 1
    unit = statistics.median(known)
    return {name: _scaled(Timing.of(values), unit) for name, values in ratios.items()}


def _scaled(timing: Timing, unit: float) -> Timing:
    return dataclasses.replace(timing, median=timing.median * unit, spread=timing.spread * unit)


def _bout(sampler: Sampler, seconds: float) -> float:
    """Seconds of a call in the second half of a bout; at least one sample, that counts."""
    begin, counted = time.perf_counter(), list[float]()
    while True:
        passed = time.perf_counter() - begin
        if passed >= seconds and counted:
            return statistics.median(counted)
        sample = sampler.sample()
        if passed >= seconds / 2 or time.perf_counter() - begin >= seconds:
            counted.append(sample)


def _warm(sampler: Sampler, most: float) -> None:
    """Run until two bouts agree, or so many seconds have passed."""
    begin, last = time.perf_counter(), 0.0
    while time.perf_counter() - begin < most:
        now = _bout(sampler, min(_WARM_SECONDS, most / 3))
        if abs(now - last) <= _STILL * now:
            return
        last = now
