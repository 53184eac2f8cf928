"""What else this machine is doing: its load, other programs on the GPU, low clocks. Read, never changed.

On a busy machine times are uncertain and everything takes longer: time limits grow with `Slowdown`, and people are told
by `note`.
"""

from __future__ import annotations

import os
import time
from typing import Any

from fagen.target import Target
from fagen.timing import nvml

MOST = 10.0  # times that a time limit grows, at most: a kernel that hangs must end some time
_SPIN_SECONDS = 5e-3  # of one thread's work, to see how long it takes
_FRESH_SECONDS = 5.0  # until the slowdown is measured anew
_BUSY = 1.25  # processes that want to run, for each core
_LOW_CLOCK = 0.9  # of the highest, under load


def average() -> float:
    """Processes that wanted to run in the last minute, this one's own among them; 0 where that is not known."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return 0.0


def cores() -> int:
    return os.cpu_count() or 1


def stretch() -> float:
    """Seconds that pass while one thread works for a second: 1 on an idle machine."""
    begin, worked = time.perf_counter(), time.thread_time()
    while time.thread_time() - worked < _SPIN_SECONDS:
        pass
    return (time.perf_counter() - begin) / _SPIN_SECONDS


class Slowdown:
    """How many times longer than on an idle machine things take, from 1 to MOST."""

    def __init__(self) -> None:
        self._factor, self._due = 1.0, 0.0

    def __call__(self) -> float:
        if time.monotonic() >= self._due:
            self._factor = min(MOST, max(1.0, average() / cores(), stretch()))
            self._due = time.monotonic() + _FRESH_SECONDS
        return self._factor


def note(target: Target, index: int | None = None) -> str:
    """What is off with this machine before a run begins, in one line; empty if nothing is.

    `index`: the GPU as torch calls it, its current one if not given.
    """
    found = [f"load {average():.1f} on {cores()} cores"] if average() > _BUSY * cores() else []
    if target.is_gpu:
        index = nvml.current_index() if index is None else index
        others = nvml.others(index)
        found += [f"{others} other process{'es' if others > 1 else ''} on the GPU"] if others else []
        found += [throttled(nvml.of(index), under_load=False)]
    said = "; ".join(text for text in found if text)
    return f"this machine is busy ({said}): times are less certain, and time limits are stretched" if said else ""


def throttled(state: dict[str, Any], *, under_load: bool) -> str:
    """Why a GPU does not run at its highest clock, where that is worth telling; `state` is as nvml.py tells it.

    Idle ones never do, and under load the power limit is what most of them meet.
    """
    reasons, now, most = set(state.get("throttle") or ()), state.get("clock_mhz"), state.get("clock_max_mhz")
    low = bool(under_load and now and most and now < _LOW_CLOCK * most and not reasons)
    told = sorted(reasons & nvml.SPOILING if under_load else reasons)
    if not told and not low:
        return ""
    at = f"at {now:.0f} of {most:.0f} MHz" if now and most else "at a lowered clock"
    return ", ".join([f"GPU {at}", *told])


def described(state: dict[str, Any]) -> str:
    """The state in which something was timed, for people; empty where nothing is known, as on a CPU."""
    words = []
    for text, now, most in (("MHz", "clock_mhz", "clock_max_mhz"), ("W", "power_w", "power_limit_w")):
        if state.get(now):
            words.append(f"{state[now]:.0f}" + (f" of {state[most]:.0f}" if state.get(most) else "") + f" {text}")
    words += [f"{state['temp_c']:.0f} C"] if state.get("temp_c") else []
    return ", ".join([*words, *(state.get("throttle") or [])])
