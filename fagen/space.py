"""The search space of a family for one problem on one target: enumerated in full, so that nothing is a surprise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fagen.families import Config, Constraint, Family
from fagen.families.base import Value
from fagen.problem import Problem
from fagen.target import Target


@dataclass(frozen=True)
class Space:
    """Every legal config, and how many each constraint removed (a config counts for the first it breaks)."""

    family: Family
    problem: Problem
    target: Target
    legal: tuple[Config, ...]
    removed: dict[str, int]

    @property
    def total(self) -> int:
        return self.family.size()


def enumerate_space(family: Family, problem: Problem, target: Target) -> Space:
    """Vary the knobs one after the other; a constraint is asked as soon as every knob it reads has a value."""
    names = [knob.name for knob in family.knobs]
    due: dict[str, list[Constraint]] = {name: [] for name in names}
    for constraint in family.constraints:
        due[max(constraint.reads or names, key=names.index)].append(constraint)
    legal: list[Config] = []
    removed = {constraint.name: 0 for constraint in family.constraints}
    values: dict[str, Value] = {}

    def first_broken(checks: list[Constraint]) -> Constraint | None:
        if not checks:
            return None
        partial = Config(values)
        return next((c for c in checks if c.check(problem, target, partial)), None)

    def vary(depth: int) -> None:
        if depth == len(names):
            legal.append(Config(values))
            return
        knob = family.knobs[depth]
        below = math.prod(len(k.choices) for k in family.knobs[depth + 1 :])
        for choice in knob.choices:
            values[knob.name] = choice
            broken = first_broken(due[knob.name])
            if broken:
                removed[broken.name] += below
            else:
                vary(depth + 1)
        del values[knob.name]

    vary(0)
    return Space(family, problem, target, tuple(legal), removed)
