"""What a family of kernels is: one template, its knobs, its constraints, what follows from a config, a default.

A knob is declared once, here in its family. The search space, the constexpr block of the rendered source, the
database's config, the cache key, the command line's help and the docs all derive from that declaration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fagen.errors import InvalidConfig
from fagen.target import Target

Value = int | str | bool


class Config(Mapping[str, Value]):
    """A value for each knob of a family: immutable, hashable, printed in the order of the knobs."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._values == dict(other)

    def __reduce__(self) -> tuple:
        return Config, (self._values,)

    def __repr__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self._values.items())

    def to_json(self) -> str:
        return json.dumps(self._values, sort_keys=True)

    def replace(self, **changes: Value) -> Config:
        return Config({**self._values, **changes})


@dataclass(frozen=True)
class Knob:
    """One way a kernel may vary. `cpp` is its constexpr in the rendered source.

    A str choice c of a knob with cpp `kLoopOrder` is rendered as the enumerator `LoopOrder::c`. A knob without a
    constexpr decides which text the template has, and leaves the source of all other choices alone.
    """

    name: str
    cpp: str  # "": none, the template asks for `config.<name>`
    choices: tuple[Value, ...]
    doc: str
    implied_by_old_records: Value | None = None  # what configs did that are older than the knob; None: there are none

    def literal(self, value: Value) -> tuple[str, str]:
        """C++ type and value."""
        if isinstance(value, bool):
            return "bool", "true" if value else "false"
        if isinstance(value, int):
            return "int", str(value)
        enum = self.cpp.removeprefix("k")
        return enum, f"{enum}::{value}"


Predicate = Callable[[Any, Target, Config], "str | None"]


@dataclass(frozen=True)
class Constraint:
    """A named predicate: None if the config is legal, else the reason with its numbers.

    `reads` names the knobs it looks at, so that a broken combination is dropped before the other knobs are varied.
    The search gives it these alone, and asks once for each combination of them. Empty means all.
    """

    name: str
    check: Predicate
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A template and everything Python knows about it."""

    name: str  # also its template: templates/<folder>/<file>
    template: str
    op: str
    dtypes: tuple[str, ...]
    knobs: tuple[Knob, ...]
    constraints: tuple[Constraint, ...]
    supports: Callable[[Any, Target], str | None]  # None, or why this family cannot serve the problem at all
    derive: Callable[[Any, Target, Config], dict[str, int]]  # cross-checked by static_assert in the source
    default: Callable[[Any, Target], Config]
    # all that the default looks at of a size point: problems of a static key that agree in it have the same default.
    # Where it is `Reads`, calls of a new size need not ask Python for it
    default_reads: Callable[[Any, Target], Hashable] = field(default=lambda problem, target: problem.size_key)
    flags: Callable[[Target], tuple[str, ...]] = field(default=lambda target: ())  # of the compiler
    # what the template is given beside problem, config and constants
    context: Callable[[Any, Config], dict[str, Any]] = field(default=lambda problem, config: {})
    # configs worth trying first, best guess first (the default is always tried and need not be repeated)
    first_configs: Callable[[Any, Target], list[Config]] = field(default=lambda problem, target: [])
    # whether a config only repeats another at a problem's sizes, which constraints do not look at: it is not searched
    repeats: Callable[[Any, Config], bool] = field(default=lambda problem, config: False)
    # about how many seconds a config will take, to order the first trials; only ratios between configs matter
    cost: Callable[[Any, Target, Config], float] | None = None
    # it serves only what no other family can: where another one does it would be slower, and is not tried
    last_resort: bool = False
    # whether calls of a problem are served; if not, the family is there for tune and emit alone
    serves_calls: Callable[[Any], bool] = field(default=lambda problem: True)
    # whether its default goes first at these sizes; `default_reads` has all that this looks at
    suits: Callable[[Any], bool] = field(default=lambda problem: True)
    # of decode: keys of a split by which blocks divide sequences of these lengths evenly; 0: the kernel does so itself
    split_keys: Callable[[Any, Target, Config, Sequence[int]], int] = field(
        default=lambda problem, target, config, lengths: 0
    )
    # knob values that cost resources, for the stable rule among ties: fewest first
    resources: Callable[[Any, Target, Config], tuple] = field(default=lambda problem, target, config: ())

    def knob(self, name: str) -> Knob:
        for knob in self.knobs:
            if knob.name == name:
                return knob
        raise InvalidConfig(f"{self.name} has no knob {name!r}", f"knobs: {', '.join(k.name for k in self.knobs)}")

    def config(self, values: Mapping[str, Value]) -> Config:
        """A config from outside: every knob there, or older than it, no other, each value among its choices."""
        for name in values:
            self.knob(name)
        ordered: dict[str, Value] = {}
        for knob in self.knobs:
            value = values.get(knob.name, knob.implied_by_old_records)
            if value is None:
                raise InvalidConfig(f"{self.name}: the config lacks knob {knob.name!r}", f"it has: {dict(values)}")
            if not any(value == c and type(value) is type(c) for c in knob.choices):
                raise InvalidConfig(f"{self.name}: {knob.name}={value!r} is no choice", f"choices: {knob.choices}")
            ordered[knob.name] = value
        return Config(ordered)

    def rejects(self, problem: Any, target: Target, config: Config) -> tuple[str, str] | None:
        """The first constraint that the config breaks, with its reason; None if it is legal."""
        for constraint in self.constraints:
            reason = constraint.check(problem, target, config)
            if reason:
                return constraint.name, reason
        return None

    def require(self, problem: Any, target: Target, config: Config) -> Config:
        broken = self.rejects(problem, target, config)
        if broken:
            raise InvalidConfig(f"{self.name}: {broken[0]}: {broken[1]}", str(config), f"problem {problem.static_key}")
        return config

    def size(self) -> int:
        count = 1
        for knob in self.knobs:
            count *= len(knob.choices)
        return count
