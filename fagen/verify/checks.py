"""The checks of a kernel before it is timed, or used: right at the sizes where kernels go wrong, and at its own.

The tuner runs them on every candidate, `dispatch.freshness` on a winner whose source has changed. A kernel that wrote
where it must not ends the tuner's process it ran in: inputs, and whatever else lives there, are suspect.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fagen import ops
from fagen.ops.base import Problem
from fagen.ops.inputs import Inputs
from fagen.runtime.kernel import launcher
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.runtime.kernel import Kernel


class Damage(Exception):
    """A kernel wrote where it must not. What this process holds cannot be trusted any more."""


def where(target: Target) -> str:
    return "cuda" if target.is_gpu else "cpu"


def synchronize(where: str) -> None:
    if where == "cuda":
        import torch

        torch.cuda.synchronize()


Make = Callable[[Any, str, bool], Inputs]


def check_inputs(problem: Problem, where: str, varied: bool) -> Inputs:
    return ops.get(problem.op).calls().inputs(problem, where, 1, varied)


kept_inputs = functools.lru_cache(maxsize=64)(check_inputs)  # of a worker: its candidates share a problem


def verify(
    kernel: Kernel, problem: Problem, target: Target, own: Callable[[], Inputs | None], make: Make = check_inputs
) -> tuple[float, str]:
    """The largest error, and what is wrong, if anything. Raises Damage.

    `own` makes the inputs of the problem's own size, or has None where there is no room for them.
    """
    calls, device, worst = ops.get(problem.op).calls(), where(target), 0.0
    problems = calls.check_problems(problem, target)
    for small in problems:
        inputs = make(small, device, small is not problems[-1])
        _run(kernel, inputs, small, device, calls.variants[0])
        verdict = calls.check(inputs.call, inputs.outputs)
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

    with plain_modes(device):
        try:
            error, message = verify(kernel, problem, target, own)
        except Damage as damage:
            error, message = 0.0, str(damage)
    return error, f"wrong at {message}" if message else ""


@contextlib.contextmanager
def plain_modes(device: str) -> Iterator[None]:
    """Torch as it is by default, whatever modes the caller is in."""
    import torch

    with torch.no_grad(), torch.autocast(device, enabled=False), torch.device("cpu"):
        yield


def _at_own_size(kernel: Kernel, inputs: Inputs, problem: Problem, device: str) -> str:
    """What is wrong there, with all outputs and, as it is timed, with fewer: all is written, a sample of it right."""
    import torch

    calls = ops.get(problem.op).calls()
    for names in calls.variants:
        _run(kernel, inputs, problem, device, names)
        for name in names:
            if bool(torch.isnan(inputs.outputs[name]).any()):
                return f"{problem.size_key}: part of {name} was not written at the problem's own size"
    verdict = calls.check_sample(inputs.call, inputs.outputs)
    return "" if verdict else f"{problem.size_key}: {verdict.message}"


def _run(kernel: Kernel, inputs: Inputs, problem: Problem, device: str, names: Sequence[str]) -> None:
    """Once, into outputs full of NaN."""
    for name in names:
        inputs.outputs[name].fill_(math.nan)
    launcher(kernel, inputs, names)()
    synchronize(device)
    damage = inputs.damage()
    if damage:
        raise Damage(f"{problem.size_key}: it {damage}")
