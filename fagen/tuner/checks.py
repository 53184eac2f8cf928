"""What a worker asks of a candidate before it is timed: right at the sizes where kernels go wrong, and at its own.

A kernel that wrote where it must not ends the process it ran in: inputs, and whatever else lives there, are suspect.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from fagen import measure
from fagen.problem import Problem
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.kernel import Kernel
    from fagen.tuner.candidate import Candidate, MeasureRequest

_VERIFY_SEQLEN = {"cpu": 512, "gpu": 2048}  # the largest of the problem itself, made small
_VERIFY_HEADS = 4


class Damage(Exception):
    """A kernel wrote where it must not. What this process holds cannot be trusted any more."""


def where(target: Target) -> str:
    return "cuda" if target.is_gpu else "cpu"


def check_problems(problem: Problem, target: Target) -> list[Problem]:
    """Sizes of the problem's static key at and off the edges of tiles, single rows, all rows hidden; then itself."""
    shapes = [(1, 1), (1, 129), (65, 63), (130, 257), (256, 256), (200, 77)]
    heads = [(4, 2), (2, 2), (3, 1)]
    bands = [(problem.window_left, problem.window_right), (17, 0), (40, 9), (-1, 5), (0, 0), (33, -1)]
    found = []
    for index, (seqlen_q, seqlen_k) in enumerate(shapes):
        q_heads, kv_heads = heads[index % len(heads)]
        left, right = bands[index] if problem.mask == "window" else bands[0]
        sizes = {"batch": 2, "heads": q_heads, "kv_heads": kv_heads, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        found.append(problem.replace(**sizes, window_left=left, window_right=right))
    most = _VERIFY_SEQLEN["gpu" if target.is_gpu else "cpu"]
    group = min(problem.heads // problem.kv_heads, _VERIFY_HEADS)
    lengths = {"seqlen_q": min(problem.seqlen_q, most), "seqlen_k": min(problem.seqlen_k, most)}
    return [*found, problem.replace(batch=1, heads=group, kv_heads=1, **lengths)]


@functools.lru_cache(maxsize=64)
def _check_inputs(problem: Problem, where: str, varied: bool) -> measure.Inputs:
    return measure.make_inputs(problem, where, seed=1, varied=varied)


def verify(kernel: Kernel, candidate: Candidate) -> tuple[float, str]:
    """The largest error, and what is wrong, if anything."""
    device, worst = where(candidate.target), 0.0
    problems = check_problems(candidate.problem, candidate.target)
    for problem in problems:
        inputs = _check_inputs(problem, device, problem is not problems[-1])
        inputs["out"].fill_(math.nan)
        inputs["lse"].fill_(math.nan)
        measure.launcher(kernel, inputs, lse=True)()
        synchronize(device)
        _undamaged(inputs, problem)
        verdict = measure.check(inputs)
        worst = max(worst, verdict.error)
        if not verdict:
            return worst, f"{problem.size_key}: {verdict.message}"
    return worst, ""


def _undamaged(inputs: measure.Inputs, problem: Problem) -> None:
    damage = inputs.damage()
    if damage:
        raise Damage(f"{problem.size_key}: it {damage}")


def synchronize(where: str) -> None:
    if where == "cuda":
        import torch

        torch.cuda.synchronize()


@functools.lru_cache(maxsize=1)
def timing_inputs(problem: Problem, target: Target, seed: int) -> list[measure.Inputs]:
    return [measure.make_inputs(problem, target, seed + i) for i in range(measure.input_sets(problem, target))]


def at_own_size(kernel: Kernel, request: MeasureRequest) -> tuple[measure.InTurn, str]:
    """The call that is to be timed, after a look at what it does at the problem's own size; and what is wrong."""
    import torch

    problem, target = request.candidate.problem, request.target
    sets = timing_inputs(problem, target, request.seed)
    call = measure.InTurn([measure.launcher(kernel, inputs) for inputs in sets])
    sets[0]["out"].fill_(math.nan)
    call()
    synchronize(where(target))
    _undamaged(sets[0], problem)
    if not bool(torch.isfinite(sets[0]["out"]).all()):
        return call, "part of the output was not written at the problem's own size"
    verdict = measure.check_sample(sets[0], request.seed)
    return call, "" if verdict else f"{problem.size_key}: {verdict.message}"
