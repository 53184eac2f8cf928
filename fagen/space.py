"""The search space of a family for one problem on one target: enumerated in full, so that nothing is a surprise."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fagen.families import Config, Family
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
    legal, removed = [], Counter({c.name: 0 for c in family.constraints})
    for config in family.every():
        broken = family.rejects(problem, target, config)
        if broken:
            removed[broken[0]] += 1
        else:
            legal.append(config)
    return Space(family, problem, target, tuple(legal), dict(removed))
