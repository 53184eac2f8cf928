"""A run: everything is compiled, then problem by problem the best config of each step is found, verified, and all
steps are timed against each other.

Outcomes of a step: `ok`; `wrong` (outside the oracle's bound, not timed); `failed` (it would not compile or run);
`cannot` (this machine or family has no way to run it); `same` (nothing differs from an earlier step on this problem).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fagen.ablation.plan import StepPlan, plan
from fagen.ablation.spec import Ablation, series
from fagen.bench import run as bench
from fagen.bench.peers import reason
from fagen.bench.prebuild import together
from fagen.build.job import Artifact
from fagen.codegen.spec import Key
from fagen.errors import FagenError
from fagen.families import Config
from fagen.ops.attention.problem import Problem
from fagen.ops.inputs import Inputs
from fagen.target import Target

FORMAT = 1
_CELLS = {"cuda": 1 << 30, "cpu": 1 << 24}  # scores that are verified; of longer problems some heads are
_NEAR = 1.15  # times the best of a step's configs: timed once more
_PICK_ROUNDS, _PICK_SECONDS = 5, 2.0

Result = dict[str, Any]
Built = dict[Key, "Artifact | FagenError"]


@dataclass(frozen=True)
class Settings:
    rounds: int = 11
    min_seconds: float = 0.2  # of a problem, all steps together
    seed: int = 0


def described(told: Ablation) -> list[Result]:
    """The steps, as the result keeps them."""
    found: list[Result] = []
    family = ""
    for step in told.steps:
        found.append(
            {name: getattr(step, name) for name in ("name", "says", "family", "variant", "all_tiles", "tuned")}
        )
        found[-1] |= {"states": dict(step.states), "starts": bool(step.family) and step.family != family}
        family = step.family or family
    return found


def build(plans: list[StepPlan], target: Target, say: Callable[[str], None]) -> Built:
    """Every kernel, many compilers at a time, none while the clock runs."""
    from fagen.build import cache as builder
    from fagen.build.compilers import compile_workers

    work = {spec.key: spec for p in plans for spec in p.specs}
    workers, built, start = compile_workers(target.is_gpu, measuring=True), Built(), time.perf_counter()
    say(f"compiling {len(work)} kernels, {workers} at a time")

    def one(key: Key) -> None:
        try:
            built[key] = builder.build(work[key])
        except FagenError as error:
            built[key] = error
        if len(built) % max(1, len(work) // 4) == 0 or len(built) == len(work):
            say(f"compiled {len(built)}/{len(work)}, {time.perf_counter() - start:.0f} s")

    together(one, work, workers)
    return built


def run_ablation(
    told: Ablation, chosen: list[Problem], target: Target, settings: Settings, *, say: Callable[[str], None],
    on_problem: Callable[[Result], None],
) -> None:  # fmt: skip
    import torch

    plans = {problem: plan(told, problem, target) for problem in chosen}
    built = build([p for of_problem in plans.values() for p in of_problem], target, say)
    with torch.no_grad():
        for problem, of_problem in plans.items():
            on_problem(_problem(problem, of_problem, built, target, settings))


# ---- a problem ------------------------------------------------------------------------------------------------------


def _problem(problem: Problem, plans: list[StepPlan], built: Built, target: Target, settings: Settings) -> Result:
    from fagen.ops.attention.inputs import make_inputs
    from fagen.ops.inputs import input_sets
    from fagen.timing import timer

    device = "cuda" if target.is_gpu else "cpu"
    count = input_sets(problem, target)
    sets = [make_inputs(problem, target, settings.seed + i) for i in range(count)]
    result: Result = {
        "series": series(problem), "length": problem.seqlen_q, "problem": problem.to_dict(), "key": problem.key,
        "flops": problem.flops(), "input_sets": count, "steps": {},
    }  # fmt: skip
    calls: dict[str, timer.Call] = {}
    earlier: dict[tuple, str] = {}
    for p in plans:
        if p.specs and p.key in earlier:
            result["steps"][p.step] = {"outcome": "same", "same_as": earlier[p.key]}
            continue
        facts, call = _step(p, sets, built, device)
        result["steps"][p.step] = facts
        if call is not None:
            calls[p.step], earlier[p.key] = call, p.step
    for name, timing in _timed(calls, device, settings, result).items():
        result["steps"][name] |= {
            "seconds": timing.median, "spread": timing.spread, "samples": timing.samples,
            "uncertainty": timing.uncertainty, "tflops": result["flops"] / timing.median / 1e12,
        }  # fmt: skip
    del calls, sets
    bench.free(device)
    gains(result["steps"])
    return result


def _step(p: StepPlan, sets: Sequence[Inputs], built: Built, device: str) -> tuple[Result, Any]:
    """The step's facts so far, and a call of its best config if what that computes is right."""
    from fagen.runtime import kernel
    from fagen.runtime.kernel import launcher
    from fagen.timing import timer

    if not p.specs:
        return {"outcome": "cannot", "reason": p.reason}, None
    facts: Result = {"family": p.specs[0].family.name, "visits": p.problem.mask, "provenance": p.provenance}
    sets = [inputs.change(window=(p.problem.window_left, p.problem.window_right)) for inputs in sets]
    artifacts = {spec: built[spec.key] for spec in p.specs}
    errors = [artifact.what for artifact in artifacts.values() if isinstance(artifact, FagenError)]
    facts["tried"] = len(artifacts) - len(errors)
    try:
        kernels = {
            spec.config: kernel.load(artifact, spec)
            for spec, artifact in artifacts.items()
            if not isinstance(artifact, FagenError)
        }
        if not kernels:
            return facts | {"outcome": "failed", "reason": errors[0]}, None
        calls = {
            config: timer.RoundRobin([launcher(made, inputs) for inputs in sets]) for config, made in kernels.items()
        }
        config = _best(calls, device)
        sets[0].outputs["out"].fill_(math.nan)
        launcher(kernels[config], sets[0])()
        bench.synchronize(device)
        verdict, checked = bench.verified(sets[0].outputs["out"], sets[0].call, _CELLS[device])
    except (FagenError, RuntimeError) as error:
        bench.alive(device, p.step, p.problem.key)
        return facts | {"outcome": "failed", "reason": reason(error)}, None
    facts |= {
        "outcome": "ok" if verdict.ok else "wrong", "config": dict(config), "facts": kernels[config].facts,
        "source_hash": kernels[config].artifact.source_hash, "error": bench.finite(verdict.error),
        "error_over_bound": bench.finite(verdict.ratio), "verified": checked,
    }  # fmt: skip
    return (facts, calls[config]) if verdict.ok else (facts | {"reason": verdict.message}, None)


def _best(calls: dict[Config, Any], device: str) -> Config:
    """The fastest config: a look at each, then those that are near against each other."""
    from fagen.timing import timer

    if len(calls) > 1:
        once = {c: min(timer.time_once(call, device=device) for _ in range(2)) for c, call in calls.items()}
        calls = {c: calls[c] for c, seconds in once.items() if seconds <= _NEAR * min(once.values())}
    if len(calls) == 1:
        return next(iter(calls))
    named = {str(c): c for c in calls}
    clock = {name: calls[c] for name, c in named.items()}
    times = timer.time_calls(clock, device=device, rounds=_PICK_ROUNDS, max_seconds=_PICK_SECONDS)
    return named[min(times, key=lambda name: times[name].median)]


def _timed(calls: dict[str, Any], device: str, settings: Settings, result: Result) -> dict[str, Any]:
    from fagen.timing import timer

    if not calls:
        return {}
    try:
        return timer.time_calls(calls, device=device, rounds=settings.rounds, min_seconds=settings.min_seconds)
    except (FagenError, RuntimeError) as error:
        bench.alive(device, "a step", result["key"])
        for name in calls:
            result["steps"][name] |= {"outcome": "failed", "reason": reason(error)}
        return {}


# ---- what each step gains -------------------------------------------------------------------------------------------


def gains(steps: Result) -> None:
    """TFLOP/s over those of the nearest step before that has a figure."""
    before = None
    for name, facts in steps.items():
        if facts["outcome"] == "same":
            facts["tflops"] = steps[facts["same_as"]].get("tflops")
            continue
        if "tflops" in facts:
            if before is not None:
                facts["gain"], facts["over"] = facts["tflops"] / steps[before]["tflops"], before
            before = name


def summary(found: list[Result]) -> dict[str, Result]:
    """By series and step: the gain over its lengths, geometric mean and range."""
    by_series: dict[str, Result] = {}
    for result in found:
        for name, facts in result["steps"].items():
            if "gain" in facts:
                by_series.setdefault(result["series"], {}).setdefault(name, []).append(facts["gain"])
    return {
        title: {
            name: {"gain": statistics.geometric_mean(values), "least": min(values), "most": max(values)}
            for name, values in steps.items()
        }
        for title, steps in by_series.items()
    }
