"""Recorded spaces: what became of every config of a problem, as data, so that a search can be replayed without it.

A file holds one space or more. A space is a line with an object, its head, and then a line with a list for each
config: the knobs' values in the head's order, then the head's columns. `.xz` files are compressed. It is an export of
a run's folder, so that recording survives what a run survives.
"""

from __future__ import annotations

import json
import lzma
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fagen import families
from fagen.errors import FagenError, UsageError
from fagen.families import Config, Family
from fagen.problem import Problem
from fagen.target import Target
from fagen.tuner import journal, resumed

FORMAT, SCHEMA = "fagen-space", 1
COLUMNS = ("outcome", "seconds", "spread", "samples", "compile_seconds", "measure_seconds", "registers", "spill_bytes")


@dataclass(frozen=True)
class Entry:
    """What became of one config. Times in seconds."""

    outcome: str
    seconds: float | None
    spread: float
    compile_seconds: float
    measure_seconds: float


@dataclass(frozen=True)
class Recorded:
    """One space of a file."""

    head: dict[str, Any]
    problem: Problem
    target: Target
    entries: dict[Config, Entry]

    @property
    def family(self) -> Family:  # by its name: a family cannot be sent to another process
        return families.get(self.head["family"])

    @property
    def best(self) -> float:
        return min((e.seconds for e in self.entries.values() if e.seconds), default=math.inf)

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
                    lines = [head, *(_line(config, row) for config, row in mine.items())]
                    file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
                    count += len(mine)
        os.replace(temporary, path)
    except OSError as error:
        raise FagenError(f"{path} cannot be written", str(error)) from error
    return count


def _heads(meta: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Family]]:
    from fagen.tuner import study

    target = Target(**meta["target"])
    fixed = {name: tuple(values) for name, values in meta.get("fixed", {}).items()}
    for fields in meta["problems"]:
        problem = Problem.from_dict(fields)
        for every in study.spaces(problem, target, meta.get("family"), fixed):
            space = every.of(problem)
            yield {
                "format": FORMAT, "schema": SCHEMA, "key": problem.key, "family": space.family.name,
                "problem": fields, "target": meta["target"], "fixed": meta.get("fixed", {}),
                "staged": not meta.get("exhaustive", False), "legal": len(space.legal),
                "knobs": [knob.name for knob in space.family.knobs], "columns": COLUMNS,
                "sources": meta.get("sources", ""), "environment": meta["environment"], "date": meta["date"],
            }, space.family  # fmt: skip


def _line(config: Config, row: dict[str, Any]) -> list[Any]:
    facts = {**row.get("facts", {}), **row}
    values = [facts.get(column) for column in COLUMNS]
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
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no recorded space", repr(error), "record one with fagen tune --record") from error
    if not found:
        raise UsageError(f"{path} is empty", remedy="record a space with fagen tune --record")
    return found


def _recorded(head: dict[str, Any]) -> Recorded:
    if head.get("format") != FORMAT or head.get("schema") != SCHEMA:
        raise UsageError(
            "the file is no recorded space of this version of fagen",
            f"format {head.get('format')} schema {head.get('schema')}, not {FORMAT} {SCHEMA}",
        )
    families.get(head["family"])  # an error where there is none
    return Recorded(head, Problem.from_dict(head["problem"]), Target(**head["target"]), {})


def _put(space: Recorded, line: list[Any], where: str) -> None:
    knobs, columns = space.head["knobs"], space.head["columns"]
    if len(line) != len(knobs) + len(columns):
        raise UsageError(f"{where}: {len(line)} values for {len(knobs)} knobs and {len(columns)} columns")
    values = dict(zip(columns, line[len(knobs) :], strict=True))
    default = space.family.default(space.problem, space.target)
    since = {knob.name: default[knob.name] for knob in space.family.knobs if knob.before is None}
    config = space.family.config({**since, **dict(zip(knobs, line, strict=False))})
    space.entries[config] = Entry(
        values["outcome"], values["seconds"], values["spread"] or 0.0,
        values["compile_seconds"] or 0.0, values["measure_seconds"] or 0.0,
    )  # fmt: skip
