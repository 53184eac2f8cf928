"""The lines of an earlier run, or of another host, read strictly: a strange one is skipped, and the run goes on."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from fagen import families, ops
from fagen.errors import FagenError
from fagen.families import Family
from fagen.tuner.messages import OUTCOMES
from fagen.tuner.result import Tuned

Row = dict[str, Any]
# what a resumed run reads of a candidate; other keys are for people and reports
_CANDIDATE = {
    "problem": str, "family": str, "config": dict[str, Any], "outcome": str, "reason": str,
    "seconds": float | None, "spread": float | None, "samples": int, "error": float | None,
}  # fmt: skip
_MAYBE = {"host": str, "device": dict[str, Any] | None, "facts": dict[str, Any]}


def candidates(rows: Iterable[Any], note: Callable[[str], None]) -> list[Row]:
    """Those that a candidate's end can be made of."""
    return _whole(rows, is_candidate, "candidates", note)


def winners(rows: Iterable[Any], note: Callable[[str], None]) -> list[Tuned]:
    return [Tuned(**row) for row in _whole(rows, _is_winner, "winners", note)]


def _whole(rows: Iterable[Any], good: Callable[[Any], bool], what: str, note: Callable[[str], None]) -> list[Row]:
    rows = list(rows)
    kept = [row for row in rows if good(row)]
    if len(kept) < len(rows):
        note(f"{len(rows) - len(kept)} of the run's {what} cannot be understood, and are skipped")
    return kept


def is_candidate(row: Any, family: Family | None = None) -> bool:
    """Whether it says all that is needed of a candidate, of one family alone if that is asked for."""
    if not isinstance(row, dict) or row.get("outcome") not in OUTCOMES:
        return False
    if not all(name in row and _matches(row[name], hint) for name, hint in _CANDIDATE.items()):
        return False
    if family is not None and row["family"] != family.name:
        return False
    if not all(_matches(row[name], hint) for name, hint in _MAYBE.items() if name in row):
        return False
    if row["outcome"] == "ok" and not (row["seconds"] and row["spread"] is not None and row["samples"] > 0):
        return False
    try:
        (family or families.get(row["family"])).config(row["config"])
    except (FagenError, RecursionError):  # knobs of another version; a value too deep to be shown
        return False
    return True


def _is_winner(row: Any) -> bool:
    hints = typing.get_type_hints(Tuned)
    required = {
        f.name
        for f in dataclasses.fields(Tuned)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if not isinstance(row, dict) or not required <= row.keys() <= hints.keys():
        return False
    if not all(_matches(value, hints[name]) for name, value in row.items()):
        return False
    try:
        ops.problem_from(row["problem"])
    except FagenError:
        return False
    return True


def _matches(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type as dataclasses name it. Numbers are finite, and none is negative."""
    if isinstance(hint, types.UnionType):
        return any(_matches(value, one) for one in typing.get_args(hint))
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float) and 0 <= value < math.inf and value < 1e300
    if typing.get_origin(hint) is dict:
        of = typing.get_args(hint)[1]
        return type(value) is dict and all(_matches(v, of) for v in value.values())
    if typing.get_origin(hint) is list:
        return type(value) is list and all(_matches(v, typing.get_args(hint)[0]) for v in value)
    return type(value) is (hint or type(None))
