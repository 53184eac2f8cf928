"""`fagen.tune`: tuning from Python."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fagen import ops
from fagen.errors import UsageError
from fagen.ops.base import Problem
from fagen.target import Target
from fagen.tuner.result import Options, Report


def tune(
    problems: Problem | Iterable[Problem],
    *,
    budget: float | str | None = None,
    trials: int | None = None,
    target: Target | None = None,
    family: str | None = None,
    gpus: Sequence[int] = (0,),
    workers: int | None = None,
    seed: int = 0,
    resume: Path | str | None = None,
    out: Path | str | None = None,
    quiet: bool = False,
) -> Report:
    """Find the fastest kernel for each problem, and keep the winners where `fagen.attention` finds them.

    budget   wall time of the whole run: seconds, or "10m" (default: 5 minutes, if `trials` is not given either)
    trials   candidates for each problem, at most
    target   the device; the first GPU, else the CPU, if not given. `gpus` measure at once, and are of one kind
    family   search this one alone
    resume   go on with a run: its folder, or "latest"
    out      database folder for the winners, if not the user's own

    The report's `records` are the winners that were written, `results` say of each problem what came of it, `failed`
    and `left` what has no winner. Workers are processes of their own: a script that calls this needs the usual
    `if __name__ == "__main__":`.
    """
    from fagen import target as devices
    from fagen.tuner import progress
    from fagen.tuner.budget import BUDGET_SECONDS, duration
    from fagen.tuner.tune import run

    begun = time.monotonic()
    asked: list[Any] = [problems] if ops.is_problem(problems) else list(dict.fromkeys(problems))  # type: ignore[arg-type]
    if not asked:
        raise UsageError("there is nothing to tune", remedy="give a Problem, or several")
    if odd := next((each for each in asked if not ops.is_problem(each)), None):
        raise UsageError(f"{odd!r} is no problem", remedy="make one with fagen.Problem(...)")
    seconds = duration(str(budget)) if budget is not None else None
    if seconds is None and trials is None:
        seconds = BUDGET_SECONDS
    options = Options(
        budget=seconds, trials=trials, seed=seed, workers=workers, devices=tuple(gpus), resume=resume, family=family,
        out=Path(out) if out is not None else None, begun=begun,
    )  # fmt: skip
    return run(asked, target or devices.detect(), options, progress.Progress() if quiet else progress.make())
