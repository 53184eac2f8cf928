"""The search space of a family for one problem on one target: enumerated in full, so that nothing is a surprise."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from fagen.errors import UsageError
from fagen.families import Config, Constraint, Family
from fagen.families.base import Value
from fagen.ops.base import Problem
from fagen.target import Target

Fixed = Mapping[str, tuple[Value, ...]]  # the choices that some knobs are restricted to


@dataclass(frozen=True)
class Space:
    """Every legal config, and how many each constraint removed (a config counts for the first it breaks)."""

    family: Family
    problem: Problem
    target: Target
    legal: tuple[Config, ...]
    removed: dict[str, int]
    total: int
    added: Config | None = None  # the default, where a restriction left it out

    def with_default(self) -> Space:
        """The default among the legal ones, where a restriction leaves it out: a winner must be measured against it."""
        default = self.family.default(self.problem, self.target)
        return self if default in self.legal else replace(self, legal=(*self.legal, default), added=default)

    def of(self, problem: Problem) -> Space:
        """The same for a problem of the static key: with its default, without what only repeats at its sizes."""
        declared = [config for config in self.legal if config != self.added]
        legal = tuple(config for config in declared if not self.family.repeats(problem, config))
        removed = {**self.removed, **({"repeats": len(declared) - len(legal)} if len(legal) < len(declared) else {})}
        return replace(self, problem=problem, legal=legal, removed=removed, added=None).with_default()


def restriction(words: Iterable[str], families: Iterable[Family]) -> dict[str, tuple[Value, ...]]:
    """KNOB=V[,V...] as choices. A knob counts as known when any of the families has it, a value likewise."""
    able = list(families)
    fixed: dict[str, tuple[Value, ...]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise UsageError(f"{word!r} fixes no knob", remedy="it is KNOB=VALUE or KNOB=VALUE,VALUE, like stages=2,3")
        choices = [c for f in able for knob in f.knobs if knob.name == name for c in knob.choices]
        if not choices:
            known = dict.fromkeys(knob.name for f in able for knob in f.knobs)
            raise UsageError(f"unknown knob {name!r}", f"knobs of {_names(able)}: {', '.join(known)}")
        by_word = {str(choice).lower(): choice for choice in choices}
        for value in values.split(","):
            if value.strip().lower() not in by_word:
                raise UsageError(f"{value!r} is no choice of knob {name!r}", f"choices: {', '.join(by_word)}")
        picked = tuple(by_word[value.strip().lower()] for value in values.split(","))
        fixed[name] = tuple(dict.fromkeys((*fixed.get(name, ()), *picked)))
    return fixed


def _names(families: Iterable[Family]) -> str:
    return ", ".join(family.name for family in families)


def enumerate_space(family: Family, problem: Problem, target: Target, fixed: Fixed | None = None) -> Space:
    """Vary the knobs one after the other; a constraint is asked as soon as every knob it reads has a value."""
    names = [knob.name for knob in family.knobs]
    choices = {k.name: tuple(c for c in k.choices if k.name not in (fixed or {}) or c in (fixed or {})[k.name])
               for k in family.knobs}  # fmt: skip
    legal: list[Config] = []
    removed = {constraint.name: 0 for constraint in family.constraints}
    values: dict[str, Value] = {}
    due: dict[str, list[tuple[str, Callable[[], bool]]]] = {name: [] for name in names}
    for constraint in family.constraints:
        reads = constraint.reads or tuple(names)
        last = max(reads, key=names.index)
        due[last].append((constraint.name, _asked_once(constraint, reads, values, problem, target)))

    def vary(depth: int) -> None:
        if depth == len(names):
            legal.append(Config(values))
            return
        knob = family.knobs[depth]
        below = math.prod(len(choices[k.name]) for k in family.knobs[depth + 1 :])
        for choice in choices[knob.name]:
            values[knob.name] = choice
            for name, breaks in due[knob.name]:
                if breaks():
                    removed[name] += below
                    break
            else:
                vary(depth + 1)
        values.pop(knob.name, None)

    vary(0)
    total = math.prod(len(among) for among in choices.values())
    return Space(family, problem, target, tuple(legal), removed, total)


def _asked_once(
    constraint: Constraint, reads: tuple[str, ...], values: Mapping[str, Value], problem: Problem, target: Target
) -> Callable[[], bool]:
    """Whether the values at hand break a constraint: asked once for each combination of the knobs that it reads."""
    combination = operator.itemgetter(*reads)
    known: dict[object, bool] = {}

    def breaks() -> bool:
        key = combination(values)
        found = known.get(key)
        if found is None:
            read = Config({name: values[name] for name in reads})
            found = known[key] = constraint.check(problem, target, read) is not None
        return found

    return breaks
