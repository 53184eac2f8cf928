"""The checks of a kernel before it is timed, or used: right at the sizes where kernels go wrong, and at its own.

The tuner asks them of every candidate, `fagen.trust` of a winner whose source has changed. A kernel that wrote where it
must not ends the tuner's process it ran in: inputs, and whatever else lives there, are suspect.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from fagen import measure
from fagen.problem import Problem
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.kernel import Kernel

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


Make = Callable[[Problem, str, bool], measure.Inputs]


def make_inputs(problem: Problem, where: str, varied: bool) -> measure.Inputs:
    return measure.make_inputs(problem, where, seed=1, varied=varied)


kept_inputs = functools.lru_cache(maxsize=64)(make_inputs)  # of a worker: its candidates share a problem


def verify(
    kernel: Kernel, problem: Problem, target: Target, own: Callable[[], measure.Inputs | None], make: Make = make_inputs
) -> tuple[float, str]:
    """The largest error, and what is wrong, if anything. Raises Damage.

    `own` makes the inputs of the problem's own size, or has None where there is no room for them.
    """
    device, worst = where(target), 0.0
    problems = check_problems(problem, target)
    for small in problems:
        inputs = make(small, device, small is not problems[-1])
        _run(kernel, inputs, small, device, lse=True)
        verdict = measure.check(inputs)
        worst = max(worst, verdict.error)
        if not verdict:
            return worst, f"{small.size_key}: {verdict.message}"
    whole = own()
    return worst, _at_own_size(kernel, whole, problem, device) if whole is not None else ""


def _at_own_size(kernel: Kernel, inputs: measure.Inputs, problem: Problem, device: str) -> str:
    """What is wrong there, with an LSE and, as it is timed, without: all is written, and a sample of it right."""
    import torch

    for lse in (True, False):
        _run(kernel, inputs, problem, device, lse=lse)
        for name in ("out", "lse"):
            if bool(torch.isnan(inputs[name]).any()):
                return f"{problem.size_key}: part of {name} was not written at the problem's own size"
    verdict = measure.check_sample(inputs, lse=True)
    return "" if verdict else f"{problem.size_key}: {verdict.message}"


def _run(kernel: Kernel, inputs: measure.Inputs, problem: Problem, device: str, *, lse: bool) -> None:
    """Once, into outputs full of NaN."""
    for name in ("out", "lse") if lse else ("out",):
        inputs[name].fill_(math.nan)
    measure.launcher(kernel, inputs, lse=lse)()
    synchronize(device)
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
