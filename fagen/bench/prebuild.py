"""Compiles what the rows need before any of them is timed: many compilers at a time, none while the clock runs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fagen.bench import by_op
from fagen.bench.rows import Row
from fagen.codegen.spec import KernelSpec
from fagen.errors import FagenError
from fagen.target import Target


def build(chosen: list[Row], target: Target, say: Callable[[str], None], held: str | None = None) -> None:
    """What fails here fails again, and is told, when its row calls it. `held` is the one family that ours may take."""
    from fagen.build import cache as builder
    from fagen.build.compilers import compile_workers
    from fagen.runtime import binding

    work: dict[Any, Callable[[], object]] = {}
    seconds = 0.0
    for problem in dict.fromkeys(problem for row in chosen for problem in _problems(row)):
        spec, built = _wanted(problem, target, held)
        if spec is not None and not built:
            seconds = max(seconds, builder.expected_seconds(spec.family, target))
            work[spec.key] = functools.partial(builder.build, spec)
    if work:
        say(f"compiling {len(work)} kernels (about {seconds:.0f} s each)")

    def attempt(make: Callable[[], object]) -> None:
        with contextlib.suppress(FagenError):
            make()

    by_binding = not held and any(by_op.get(row.measured).by_binding for row in chosen)
    jobs = [*([binding.make] if by_binding else []), *work.values()]
    together(attempt, jobs, compile_workers(target.is_gpu, measuring=True))


def together(do: Callable[[Any], object], jobs: Iterable[Any], workers: int) -> None:
    """Several at a time; those that have not begun are dropped when the user interrupts."""
    pool = ThreadPoolExecutor(workers)
    try:
        list(pool.map(do, jobs))
    finally:
        pool.shutdown(cancel_futures=True)


def _problems(row: Row) -> list[Any]:
    return [row.problem, row.problem.forward] if row.training else [row.problem]


def _wanted(problem: Any, target: Target, held: str | None) -> tuple[KernelSpec | None, bool]:
    """What serves the problem, and whether it is built."""
    from fagen import explanation
    from fagen.bench import family
    from fagen.bench.peers import Cannot
    from fagen.build import cache as builder

    if held is None:
        report = explanation.explain_problem(problem, target)
        return report.choice.spec, bool(report.built)
    try:
        picked, _ = family.pick(problem, target, held)
        return picked, builder.lookup(picked) is not None
    except (Cannot, FagenError):
        return None, False
