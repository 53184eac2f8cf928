"""Recorded spaces: what became of every config of a problem, as data, so that a search can be replayed without it.

A file holds one space or more. A space is a line with an object, its head, and then a line with a list for each
config: the knobs' values in the head's order, then the head's columns. `.xz` files are compressed. It is an export of
a run's folder, so that recording survives what a run survives.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fagen import families, ops, schema
from fagen.errors import FagenError, InvalidArgument, UsageError
from fagen.families import Config, Family
from fagen.families.base import Value
from fagen.ops.base import Problem
from fagen.target import Target
from fagen.tuner import journal, resumed

FORMAT, SCHEMA = "fagen-space", 1
COLUMNS = ("outcome", "seconds", "spread", "samples", "compile_seconds", "measure_seconds", "registers", "spill_bytes")
DRAWN = "drawn"  # a column of records that are a sample: false where a config was added to those drawn by chance


@dataclass(frozen=True)
class RecordedTrial:
    """What became of one config. Times in seconds."""

    outcome: str
    seconds: float | None
    spread: float
    compile_seconds: float
    measure_seconds: float
    drawn: bool = True


@dataclass(frozen=True)
class Recorded:
    """One space of a file."""

    head: dict[str, Any]
    problem: Any
    target: Target
    entries: dict[Config, RecordedTrial]

    @property
    def family(self) -> Family:  # by its name: a family cannot be sent to another process
        return families.get(self.head["family"])

    @functools.cached_property
    def younger_knobs(self) -> dict[str, Value]:
        """The default's values, for knobs that a record from before them says nothing of."""
        default = self.family.default(self.problem, self.target)
        return {knob.name: default[knob.name] for knob in self.family.knobs if knob.implied_by_old_records is None}

    @property
    def best(self) -> float:
        return min((e.seconds for e in self.entries.values() if e.seconds), default=math.inf)

    def of_chance(self) -> Recorded:
        """Without what was recorded for another reason than that it was drawn."""
        return dataclasses.replace(self, entries={c: e for c, e in self.entries.items() if e.drawn})

    @property
    def complete(self) -> bool:
        return len(self.entries) >= self.head["legal"]


def _open(path: Path, mode: str) -> IO[str]:
    return lzma.open(path, f"{mode}t", encoding="utf-8") if path.suffix == ".xz" else open(path, mode, encoding="utf-8")  # type: ignore[return-value]


# ---- writing --------------------------------------------------------------------------------------------------------


def export(run: Path, path: Path) -> int:
    """Write what a run measured; how many configs that was. The file is whole or is not there."""
    meta = json.loads((run / journal.META).read_text())
    told = journal.read_lines(run / journal.TRIALS)
    rows = [row for row in told if resumed.is_candidate(row) and row["outcome"] != "constraint"]
    temporary, count = path.with_name(f".part-{path.name}"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open(temporary, "w") as file:
            for head, family in _heads(meta):
                mine = {}
                for row in rows:
                    if row["problem"] == head["key"] and row["family"] == family.name:
                        mine[Config(row["config"])] = row
                if mine:
                    lines = [head, *(line_of(config, row) for config, row in mine.items())]
                    file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
                    count += len(mine)
        os.replace(temporary, path)
    except OSError as error:
        raise FagenError(f"{path} cannot be written", str(error)) from error
    return count


def _heads(meta: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Family]]:
    from fagen.tuner import tune

    target = Target.from_dict(meta["target"])
    fixed = {name: tuple(values) for name, values in meta.get("fixed", {}).items()}
    for fields in meta["problems"]:
        problem = ops.problem_from(fields)
        for every in tune.spaces(problem, target, meta.get("family"), fixed):
            space = every.of(problem)
            about = {
                "fixed": meta.get("fixed", {}), "staged": not meta.get("exhaustive", False),
                "sources": meta.get("sources", ""), "environment": meta["environment"], "date": meta["date"],
            }  # fmt: skip
            yield head_of(space.family, problem, target, len(space.legal), **about), space.family


def head_of(
    family: Family, problem: Problem, target: Target, legal: int, columns: Sequence[str] = COLUMNS, **about: Any
) -> dict[str, Any]:
    """A space's first line. `legal`: how many configs there are, recorded or not."""
    return {
        "format": FORMAT, "schema": SCHEMA, "key": problem.key, "family": family.name,
        "problem": problem.to_dict(), "target": dataclasses.asdict(target), "legal": legal,
        "knobs": [knob.name for knob in family.knobs], "columns": list(columns), **about,
    }  # fmt: skip


def line_of(config: Config, row: dict[str, Any], columns: Sequence[str] = COLUMNS) -> list[Any]:
    """A config's line, from what is known of it by name."""
    facts = {**row.get("facts", {}), **row}
    values = [facts.get(column) for column in columns]
    return [*config.values(), *(float(f"{v:.6g}") if isinstance(v, float) else v for v in values)]


# ---- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Recorded]:
    """The spaces of a file. A knob that the family got since has what configs did before it, or its default's value;
    one that is gone is an error."""
    found: list[Recorded] = []
    try:
        with _open(path, "r") as file:
            for number, line in enumerate(file, 1):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(_recorded(value))
                elif not found:
                    raise UsageError(f"{path} is no recorded space", "its first line is no head")
                else:
                    _put(found[-1], value, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise UsageError(f"{path} cannot be read", str(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = error.what if isinstance(error, FagenError) else schema.shown(error)
        raise UsageError(f"{path} is no recorded space", why, "record one with fagen tune --record") from error
    if not found:
        raise UsageError(f"{path} is empty", remedy="record a space with fagen tune --record")
    return found


def _or_none(check: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "" if value is None else check(value)


_CHECKS = {
    "outcome": schema.identifier, "seconds": _or_none(schema.seconds), "spread": _or_none(schema.spread),
    "compile_seconds": _or_none(schema.spread), "measure_seconds": _or_none(schema.spread),
}  # fmt: skip


def _recorded(head: dict[str, Any]) -> Recorded:
    if head.get("format") != FORMAT or head.get("schema") != SCHEMA:
        raise UsageError(
            "the file is no recorded space of this version of fagen",
            f"{schema.shown(head.get('format'))} {schema.shown(head.get('schema'))}, not {FORMAT!r} {SCHEMA}",
        )
    problem, target = ops.problem_from(head["problem"]), Target.from_dict(head["target"])
    wrong = schema.integer(head["legal"], 1) or schema.identifier(head["family"])
    for name in ("knobs", "columns"):
        names = head[name] if isinstance(head[name], list) else [head[name]]
        wrong = wrong or next(filter(None, map(schema.identifier, names)), "")
        wrong = wrong or (f"{name} with a name twice" if len(set(names)) < len(names) else "")
    wrong = wrong or ("" if head["key"] == problem.key else f"key {schema.shown(head['key'])} is not its problem's")
    wrong = wrong or families.get(head["family"]).supports(problem, target) or ""
    if wrong:
        raise InvalidArgument(wrong)
    return Recorded(head, problem, target, {})


def _put(space: Recorded, line: list[Any], where: str) -> None:
    knobs, columns = space.head["knobs"], space.head["columns"]
    if not isinstance(line, list):
        raise UsageError(f"{where}: {schema.shown(line)} is no list of values")
    if len(line) != len(knobs) + len(columns):
        raise UsageError(f"{where}: {len(line)} values for {len(knobs)} knobs and {len(columns)} columns")
    values = dict(zip(columns, line[len(knobs) :], strict=True))
    for name, check in _CHECKS.items():
        wrong = check(values[name])
        if wrong:
            raise UsageError(f"{where}: {name}: {wrong}")
    if type(values.get(DRAWN, True)) is not bool:
        raise UsageError(f"{where}: {DRAWN}: {schema.shown(values[DRAWN])} is neither true nor false")
    config = space.family.config({**space.younger_knobs, **dict(zip(knobs, line, strict=False))})
    space.entries[config] = RecordedTrial(
        values["outcome"], values["seconds"], values["spread"] or 0.0,
        values["compile_seconds"] or 0.0, values["measure_seconds"] or 0.0, values.get(DRAWN, True),
    )  # fmt: skip
