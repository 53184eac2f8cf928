"""The registry: families in the order in which dispatch tries them."""

from __future__ import annotations

from fagen.errors import UsageError
from fagen.families.base import Config, Constraint, Family, Knob, nothing
from fagen.ops.attention.problem import Problem
from fagen.target import Target

__all__ = ["Config", "Constraint", "Family", "Knob", "all_families", "candidates", "get", "nothing"]


def all_families() -> tuple[Family, ...]:
    from fagen.families import cpu_backward, cpu_forward, sm80_forward, sm90_forward

    return (cpu_forward.FAMILY, sm90_forward.FAMILY, sm80_forward.FAMILY, cpu_backward.FAMILY)


def get(name: str) -> Family:
    for family in all_families():
        if family.name == name:
            return family
    raise UsageError(f"unknown family {name!r}", f"known: {', '.join(f.name for f in all_families())}")


def candidates(problem: Problem, target: Target) -> tuple[list[Family], dict[str, str]]:
    """Families that can serve the problem on the target, and why each other one cannot."""
    able, reasons = [], {}
    for family in all_families():
        same = family.op == problem.op
        reason = family.supports(problem, target) if same else f"serves {family.op}, not {problem.op}"
        if reason:
            reasons[family.name] = reason
        else:
            able.append(family)
    return able, reasons
