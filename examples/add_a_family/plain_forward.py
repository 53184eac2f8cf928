"""One row at a time, plain loops: slow and obvious."""

from __future__ import annotations

from fagen.families.base import Config, Family, Knob
from fagen.ops.attention.problem import Problem
from fagen.target import Target


def _supports(problem: Problem, target: Target) -> str | None:
    if target.is_gpu:
        return "runs on the CPU only"
    if problem.dtype != "fp32":
        return f"dtype {problem.dtype}: only fp32"
    if problem.mask == "intervals" or problem.softcap or problem.alibi:
        return "no intervals, softcap or alibi"
    return None


FAMILY = Family(
    name="plain_forward",
    template="cpu/plain.cpp.j2",
    op="forward",
    dtypes=("fp32",),
    knobs=(Knob("chunk", "kChunk", (1, 8, 64), "rows a thread takes at a time"),),
    constraints=(),
    supports=_supports,
    derive=lambda problem, target, config: {},
    default=lambda problem, target: Config({"chunk": 8}),
)
