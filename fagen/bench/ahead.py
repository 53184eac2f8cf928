"""Compiles what the rows need before any of them is timed: many compilers at a time, none while the clock runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fagen.bench.rows import Row
from fagen.errors import FagenError
from fagen.target import Target


def build(chosen: list[Row], target: Target, say: Callable[[str], None]) -> None:
    """What fails here fails again, and is told, when its row calls it."""
    from fagen import binding, dispatch
    from fagen import build as builder
    from fagen.tuner.workers import compile_workers

    work: dict[Any, Callable[[], object]] = {}
    seconds = 0.0
    for row in chosen:
        report = dispatch.explain_problem(row.problem, target)
        family, config = report.choice.family, report.choice.config
        if family is not None and config is not None and not report.built:
            key = family.name, row.problem.static_key, config
            seconds = max(seconds, builder.expected_seconds(family, target))
            work[key] = functools.partial(builder.build, family, row.problem, target, config)
    if work:
        say(f"compiling {len(work)} kernels (about {seconds:.0f} s each)")

    def attempt(make: Callable[[], object]) -> None:
        with contextlib.suppress(FagenError):
            make()

    with ThreadPoolExecutor(compile_workers(target.is_gpu)) as pool:
        list(pool.map(attempt, [binding.make, *work.values()]))
