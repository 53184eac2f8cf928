"""The checks of a kernel before it is timed, or used: right at the sizes where kernels go wrong, and at its own.

The tuner runs them on every candidate, `dispatch.freshness` on a winner whose source has changed. A kernel that wrote
where it must not ends the tuner's process it ran in: inputs, and whatever else lives there, are suspect.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from fagen.ops.attention import reference
from fagen.ops.attention.inputs import Inputs, make_inputs
from fagen.ops.attention.problem import Problem
from fagen.runtime.kernel import launcher
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.runtime.kernel import Kernel

_VERIFY_SEQLEN = {"cpu": 512, "gpu": 2048}  # the largest of the problem itself, made small
_VERIFY_HEADS = 4
_SAMPLED_HEADS, _SAMPLED_BLOCKS = 4, 4  # that are checked at a problem's own size


class Damage(Exception):
    """A kernel wrote where it must not. What this process holds cannot be trusted any more."""


def where(target: Target) -> str:
    return "cuda" if target.is_gpu else "cpu"


def synchronize(where: str) -> None:
    if where == "cuda":
        import torch

        torch.cuda.synchronize()


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


Make = Callable[[Problem, str, bool], Inputs]


def check_inputs(problem: Problem, where: str, varied: bool) -> Inputs:
    return make_inputs(problem, where, seed=1, varied=varied)


kept_inputs = functools.lru_cache(maxsize=64)(check_inputs)  # of a worker: its candidates share a problem


def verify(
    kernel: Kernel, problem: Problem, target: Target, own: Callable[[], Inputs | None], make: Make = check_inputs
) -> tuple[float, str]:
    """The largest error, and what is wrong, if anything. Raises Damage.

    `own` makes the inputs of the problem's own size, or has None where there is no room for them.
    """
    device, worst = where(target), 0.0
    problems = check_problems(problem, target)
    for small in problems:
        inputs = make(small, device, small is not problems[-1])
        _run(kernel, inputs, small, device, lse=True)
        verdict = reference.check(inputs.call, inputs.outputs)
        worst = max(worst, verdict.error)
        if not verdict:
            return worst, f"{small.size_key}: {verdict.message}"
    whole = own()
    return worst, _at_own_size(kernel, whole, problem, device) if whole is not None else ""


def compare(kernel: Any, problem: Problem, target: Target) -> tuple[float, str]:
    """The largest error, and what is wrong, if anything, by the tuner's own checks.

    Leaves the caller's random numbers and modes as they were.
    """
    import torch

    device = where(target)

    def own() -> Any:
        try:
            return check_inputs(problem, device, False)
        except torch.OutOfMemoryError:  # the caller's own tensors leave no room: the small sizes have to do
            return None

    with torch.no_grad(), torch.autocast(device, enabled=False), torch.device("cpu"):
        try:
            error, message = verify(kernel, problem, target, own)
        except Damage as damage:
            error, message = 0.0, str(damage)
    return error, f"wrong at {message}" if message else ""


def _at_own_size(kernel: Kernel, inputs: Inputs, problem: Problem, device: str) -> str:
    """What is wrong there, with an LSE and, as it is timed, without: all is written, and a sample of it right."""
    import torch

    for lse in (True, False):
        _run(kernel, inputs, problem, device, lse=lse)
        for name, t in inputs.outputs.items():
            if bool(torch.isnan(t).any()):
                return f"{problem.size_key}: part of {name} was not written at the problem's own size"
    verdict = check_sample(inputs, lse=True)
    return "" if verdict else f"{problem.size_key}: {verdict.message}"


def check_sample(inputs: Inputs, seed: int = 0, *, lse: bool = False) -> reference.Verdict:
    """Whether `out` (and `lse`, if asked) is right in a few heads and blocks of rows, first and last among them.

    For sizes at which to check all of it would take longer than to time it.
    """
    random, call = Random(seed), inputs.call
    outputs = {name: t for name, t in inputs.outputs.items() if lse or name != "lse"}
    planes = call.batch * call.heads
    chosen = {0, planes - 1, *(random.randrange(planes) for _ in range(_SAMPLED_HEADS - 2))}
    last = (call.seqlen_q - 1) // reference.ROW_BLOCK
    blocks = {0, last, *(random.randint(0, last) for _ in range(_SAMPLED_BLOCKS - 2))}
    slices = [slice(i * reference.ROW_BLOCK, min(call.seqlen_q, (i + 1) * reference.ROW_BLOCK)) for i in sorted(blocks)]
    worst = reference.Verdict(True, 0.0, 0.0)
    for plane in sorted(chosen):
        b, h = divmod(plane, call.heads)
        verdict = reference.check(*reference.part(call, outputs, b, slice(h, h + 1)), slices)
        if not verdict:
            return dataclasses.replace(verdict, message=f"sample of batch {b} head {h}: {verdict.message}")
        worst = max(worst, verdict, key=lambda v: v.ratio)
    return worst


def _run(kernel: Kernel, inputs: Inputs, problem: Problem, device: str, *, lse: bool) -> None:
    """Once, into outputs full of NaN."""
    for name, t in inputs.outputs.items():
        if lse or name != "lse":
            t.fill_(math.nan)
    launcher(kernel, inputs, lse=lse)()
    synchronize(device)
    damage = inputs.damage()
    if damage:
        raise Damage(f"{problem.size_key}: it {damage}")
