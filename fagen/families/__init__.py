"""The registry: families in the order in which dispatch tries them, those of the extensions last."""

from __future__ import annotations

from fagen import extensions
from fagen.errors import UsageError
from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.reads import Reads, nothing
from fagen.ops.base import Problem
from fagen.target import Target

__all__ = [
    "Config",
    "Constraint",
    "Family",
    "Knob",
    "Reads",
    "all_families",
    "candidates",
    "get",
    "nothing",
    "searched",
    "serving",
]


def all_families() -> tuple[Family, ...]:
    from fagen.families import (
        cpu_backward,
        cpu_decode,
        cpu_few_rows,
        cpu_forward,
        cpu_softmax,
        simt_backward,
        simt_forward,
        simt_softmax,
        sm80_backward,
        sm80_backward_fp32,
        sm80_decode,
        sm80_forward,
        sm80_forward_fp32,
        sm90_backward,
        sm90_backward_large,
        sm90_decode,
        sm90_decode_mla,
        sm90_forward,
        sm90_forward_fp8,
        sm90_forward_large,
    )

    hopper = (sm90_forward.FAMILY, sm90_forward_large.FAMILY)
    tensor_cores = (*hopper, sm80_forward.FAMILY, sm80_forward_fp32.FAMILY)
    forward = (cpu_few_rows.FAMILY, cpu_forward.FAMILY, *tensor_cores, simt_forward.FAMILY)
    on_hopper = (sm90_backward.FAMILY, sm90_backward_large.FAMILY)
    on_ampere = (sm80_backward.FAMILY, sm80_backward_fp32.FAMILY)
    backward = (cpu_backward.FAMILY, *on_hopper, *on_ampere, simt_backward.FAMILY)
    decode = (cpu_decode.FAMILY, sm90_decode.FAMILY, sm90_decode_mla.FAMILY, sm80_decode.FAMILY)
    softmax = (cpu_softmax.FAMILY, simt_softmax.FAMILY)
    fp8 = (sm90_forward_fp8.FAMILY,)
    return extensions.with_offered((*forward, *backward, *decode, *softmax, *fp8), "FAMILIES")


def get(name: str) -> Family:
    for family in all_families():
        if family.name == name:
            return family
    raise UsageError(f"unknown family {name!r}", f"known: {', '.join(f.name for f in all_families())}")


def candidates(problem: Problem, target: Target) -> tuple[list[Family], dict[str, str]]:
    """Families of the problem's op that can serve it on the target, and why each other one cannot. Those that serve no
    calls come last."""
    able: list[Family] = []
    reasons: dict[str, str] = {}
    for family in all_families():
        if family.op != problem.op:
            continue
        reason = family.supports(problem, target)
        better = [other for other in able if other.serves_calls(problem)] if family.last_resort else []
        if not reason and better:
            reason = f"the last resort, and {better[0].name} serves this"
        if reason:
            reasons[family.name] = reason
        else:
            able.append(family)
    return sorted(able, key=lambda family: not family.serves_calls(problem)), reasons


def searched(problem: Problem, target: Target, only: str | None = None) -> tuple[list[Family], dict[str, str]]:
    """Families by which a problem is tuned: the one that is named, else those that its sizes suit."""
    able, reasons = candidates(problem, target)
    if only is not None:
        return [family for family in able if family is get(only)], reasons
    return [family for family in able if family.suits(problem)] or able, reasons


def serving(problem: Problem, target: Target) -> tuple[list[Family], dict[str, str]]:
    """The same of the families that serve calls."""
    able, reasons = candidates(problem, target)
    why = "it serves no calls of this dtype: others are faster, or it has not run on a GPU yet"
    idle = {family.name: why for family in able if not family.serves_calls(problem)}
    return [family for family in able if family.name not in idle], reasons | idle
