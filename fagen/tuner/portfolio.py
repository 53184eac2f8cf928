"""The fewest configs that keep every recorded size of a static key within some per cent of its winner.

Fewer kernels are compiled, loaded and shipped, and sizes that lie beside each other agree. What a config costs at a
size must have been measured: in a recorded space, in a run's folder, by `benchmarks/between.py`, or as a record. Times
of different runs do not compare, so that a ratio is always of one of them, to the size's winner there; of several the
worst counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fagen import families, ops
from fagen.db.record import Record, now, slug
from fagen.errors import FagenError, UsageError
from fagen.families import Config
from fagen.ops.base import Problem

UNVERIFIED = "0" * 16  # the source hash of a record whose kernel nobody verified: its first use does
_MOST_STEPS = 200_000  # of the exact search; then what it found stands, which is no worse than the greedy set

Kernel = tuple[str, Config]  # family and config: of one static key and device, all that makes a kernel
Place = tuple[str, str, str]  # arch, device's slug, static key


@dataclass
class Times:
    """What one source (a run, a space) measured at a size; and what else it knows of a kernel."""

    problem: Problem
    seconds: dict[Kernel, float]
    facts: dict[Kernel, dict[str, Any]] = field(default_factory=dict)  # source_hash and error, where they were kept


Sources = dict[Place, list[Times]]


@dataclass(frozen=True)
class Portfolio:
    """The chosen kernels of a static key on a device, and for each size the one of them that serves it."""

    place: Place
    chosen: tuple[Kernel, ...]
    serves: dict[str, tuple[Kernel, float]]  # by size key; the ratio to the winner
    winners: dict[str, Kernel]
    exact: bool  # whether it is known that fewer would not do

    def to_dict(self) -> dict[str, Any]:
        arch, device, static_key = self.place
        names = {kernel: number for number, kernel in enumerate(self.chosen, 1)}
        return {
            "arch": arch, "device": device, "static_key": static_key, "exact": self.exact,
            "winners": len(set(self.winners.values())),
            "kernels": [{"family": family, "config": dict(config)} for family, config in self.chosen],
            "sizes": {size: {"kernel": names[k], "ratio": ratio} for size, (k, ratio) in self.serves.items()},
        }  # fmt: skip


# ---- what was measured ----------------------------------------------------------------------------------------------


def read(paths: Iterable[Path]) -> Sources:
    """Recorded spaces, runs' folders, results of between.py. Configs that are not legal today are left out."""
    found: Sources = {}
    for path in paths:
        kind = _run if path.is_dir() else _between if path.suffix == ".json" else _spaces
        for (arch, device), times in kind(path):
            found.setdefault((arch, slug(device), times.problem.static_key), []).append(times)
    return found


def _spaces(path: Path) -> list[tuple[tuple[str, str], Times]]:
    from fagen.tuner import recorded_space

    found = []
    for space in recorded_space.read(path):
        name = space.family.name
        legal = {c: e for c, e in space.entries.items() if not space.family.rejects(space.problem, space.target, c)}
        seconds = {(name, c): e.seconds for c, e in legal.items() if e.outcome == "ok" and e.seconds}
        found.append(((space.target.arch, space.target.device), Times(space.problem, seconds)))
    return found


def _run(path: Path) -> list[tuple[tuple[str, str], Times]]:
    """A run's candidates by problem; the latest line of a config counts."""
    from fagen.target import Target
    from fagen.tuner import journal

    try:
        meta = json.loads((path / journal.META).read_text())
        target = Target.from_dict(meta["target"])
        problems = [ops.problem_from(fields) for fields in meta["problems"]]
    except (OSError, ValueError, KeyError, TypeError, FagenError) as error:
        raise UsageError(f"{path} is no run of fagen tune", str(error).splitlines()[0]) from error
    found = {problem.key: Times(problem, {}) for problem in problems}
    for row in journal.read_lines(path / journal.TRIALS):
        times, seconds = found.get(str(row.get("problem"))), row.get("seconds")
        if times is None or row.get("outcome") != "ok" or not isinstance(seconds, float) or not 0 < seconds < math.inf:
            continue
        try:
            family = families.get(str(row.get("family")))
            config = family.require(times.problem, target, family.config(row["config"]))
        except (FagenError, KeyError, TypeError):
            continue
        times.seconds[family.name, config] = seconds
        times.facts[family.name, config] = {name: row.get(name) for name in ("source_hash", "error")}
    return [((target.arch, target.device), times) for times in found.values()]


def _between(path: Path) -> list[tuple[tuple[str, str], Times]]:
    """Rows of `benchmarks/between.py`: the configs of all records of a static key, timed against each other."""
    from fagen.target import Target

    found = []
    try:
        data = json.loads(path.read_text())
        target = Target.from_dict(data["target"])
        for row in data["rows"]:
            problem, family = ops.problem_from(row["fields"]), families.get(row["family"])
            times = Times(problem, {})
            for label, values in row["configs"].items():
                seconds = row["seconds"].get(label)
                if isinstance(seconds, float) and 0 < seconds < math.inf:
                    with contextlib.suppress(FagenError):
                        config = family.require(problem, target, family.config(values))
                        times.seconds[family.name, config] = seconds
            found.append(((target.arch, target.device), times))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FagenError) as error:
        raise UsageError(f"{path} has no times that can be read", str(error).splitlines()[0]) from error
    return found


# ---- ratios ---------------------------------------------------------------------------------------------------------


def _kernel(record: Record) -> Kernel | None:
    """None where today's families do not know the record's config."""
    try:
        return record.family, families.get(record.family).config(record.config)
    except FagenError:
        return None


def ratios(records: Iterable[Record], sources: Iterable[Times]) -> dict[str, dict[Kernel, float]]:
    """By size, what a kernel's time is to the winner's; the winner itself first. Of one static key and device.

    The sizes are those of the records; where there are none, those of the sources.
    """
    found: dict[str, dict[Kernel, float]] = {}
    fastest: dict[str, Record] = {}
    for record in records:
        size = record.problem.size_key
        if _kernel(record) is not None and (size not in fastest or record.seconds < fastest[size].seconds):
            fastest[size] = record
    for size, record in fastest.items():
        kernel = _kernel(record)
        assert kernel is not None
        found[size] = {kernel: 1.0}
    for times in sources:
        if not times.seconds or (fastest and times.problem.size_key not in fastest):
            continue
        best = min(times.seconds, key=lambda kernel: times.seconds[kernel])
        known = found.setdefault(times.problem.size_key, {best: 1.0})
        winner = next(iter(known))
        if winner not in times.seconds:
            continue  # nothing says how its times compare with the winner's
        for kernel, seconds in times.seconds.items():
            if kernel != winner:
                known[kernel] = max(known.get(kernel, 0.0), seconds / times.seconds[winner])
    return found


# ---- the set --------------------------------------------------------------------------------------------------------


def choose(place: Place, known: Mapping[str, Mapping[Kernel, float]], within: float) -> Portfolio:
    """The smallest set of kernels of which each size has one that is no slower than `within` allows."""
    covers: dict[Kernel, frozenset[str]] = {}
    for kernel in sorted({k for costs in known.values() for k in costs}, key=_order):
        covers[kernel] = frozenset(size for size, costs in known.items() if costs.get(kernel, math.inf) <= 1 + within)
    useful = {k: sizes for k, sizes in covers.items() if sizes and not _repeats(k, sizes, covers, known)}
    greedy = _greedy(useful, known)
    chosen, exact = _exact(useful, known, greedy)
    serves = {size: min(((k, costs[k]) for k in chosen if k in costs), key=lambda pair: pair[1])
              for size, costs in known.items()}  # fmt: skip
    winners = {size: next(iter(costs)) for size, costs in known.items()}
    return Portfolio(place, tuple(sorted(chosen, key=_order)), serves, winners, exact)


def _order(kernel: Kernel) -> tuple[str, str]:
    return kernel[0], kernel[1].to_json()


def _cost(kernels: Iterable[Kernel], known: Mapping[str, Mapping[Kernel, float]]) -> float:
    """Among sets of as many kernels the one that is nearest to the winners is taken."""
    some = list(kernels)
    return sum(min((costs[k] for k in some if k in costs), default=math.inf) for costs in known.values())


def _repeats(
    kernel: Kernel, sizes: frozenset[str], covers: Mapping[Kernel, frozenset[str]],
    known: Mapping[str, Mapping[Kernel, float]],
) -> bool:  # fmt: skip
    """Whether another one serves all that this one does, and no worse; of equals the first stays."""
    for other, more in covers.items():
        if other == kernel or not sizes <= more:
            continue
        pairs = [(known[size][other], known[size][kernel]) for size in sizes]
        if all(a <= b for a, b in pairs) and (
            sizes < more or any(a < b for a, b in pairs) or _order(other) < _order(kernel)
        ):
            return True
    return False


def _greedy(covers: Mapping[Kernel, frozenset[str]], known: Mapping[str, Mapping[Kernel, float]]) -> list[Kernel]:
    left, chosen = set(known), list[Kernel]()
    while left:
        best = max(covers, key=lambda k: (len(covers[k] & left), -_cost([*chosen, k], known)))
        chosen.append(best)
        left -= covers[best]
    return chosen


def _exact(
    covers: Mapping[Kernel, frozenset[str]], known: Mapping[str, Mapping[Kernel, float]], greedy: list[Kernel]
) -> tuple[list[Kernel], bool]:
    """The best set by branching on the size that fewest kernels serve; the greedy one where that takes too long."""
    best, steps = (len(greedy), _cost(greedy, known), greedy), itertools.count()
    widest = max(map(len, covers.values()), default=1)

    def branch(left: frozenset[str], chosen: list[Kernel]) -> bool:
        nonlocal best
        if next(steps) > _MOST_STEPS:
            return False
        if not left:
            best = min(best, (len(chosen), _cost(chosen, known), chosen), key=lambda found: found[:2])
            return True
        if len(chosen) + math.ceil(len(left) / widest) > best[0]:
            return True
        size = min(sorted(left), key=lambda size: sum(size in sizes for sizes in covers.values()))
        serving = sorted((k for k in covers if size in covers[k]), key=lambda k: -len(covers[k] & left))
        return all(branch(left - covers[kernel], [*chosen, kernel]) for kernel in serving)

    return (best[2], True) if branch(frozenset(known), []) else (best[2], False)


# ---- records --------------------------------------------------------------------------------------------------------


def apply(portfolio: Portfolio, records: Iterable[Record], sources: Iterable[Times]) -> list[Record]:
    """The records with the portfolio's kernels in the place of theirs. Of a size that several families have, the
    fastest is the one that is replaced, and slower ones go: they would serve nothing."""
    some, facts = list(records), dict[Kernel, dict[str, Any]]()
    for times in sources:
        facts |= times.facts
    for record in some:
        kernel = _kernel(record)
        if kernel is not None:
            facts[kernel] = {"source_hash": record.source_hash, "error": record.error}
    by_size: dict[str, list[Record]] = {}
    for record in some:
        by_size.setdefault(record.problem.size_key, []).append(record)
    made = []
    for size, here in by_size.items():
        if size not in portfolio.serves:
            made += here
            continue
        (kernel, ratio), winner = portfolio.serves[size], min(here, key=lambda r: (_kernel(r) is None, r.seconds))
        if kernel == _kernel(winner):
            made.append(winner)
            continue
        told = facts.get(kernel, {})
        made.append(
            dataclasses.replace(
                winner, family=kernel[0], config=dict(kernel[1]), seconds=winner.seconds * ratio, date=now(),
                source_hash=str(told.get("source_hash") or UNVERIFIED), error=float(told.get("error") or 0.0),
            )
        )  # fmt: skip
    return made
