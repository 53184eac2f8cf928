"""A run's folder as plain facts: what was asked, what became of every candidate, who won.

Runs of older and newer versions are read alike: a key that is missing is unknown, one that is strange is left alone.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fagen import env, families, ops
from fagen.errors import FagenError, UsageError
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.tuner import journal

PAUSE = 600.0  # seconds between two candidates' ends that count as the run having stood still
_MOST = 1e300  # of a number; an integer beyond has no float
Row = dict[str, Any]


# ---- which run ------------------------------------------------------------------------------------------------------


def find(word: str | None) -> Path:
    """The folder of a run, or a file of candidates: a path, a name among the kept runs, or the latest of them."""
    runs = env.runs_dir()
    kept = sorted(path.name for path in runs.glob("*") if _is_run(path))
    if word is None or word == "latest":
        if not kept:
            remedy = "fagen tune makes one; or name its folder: fagen report RUN"
            raise UsageError("there is no run to report on", f"looked in {runs}", remedy)
        return runs / kept[-1]
    for path in (Path(word), runs / word):
        if path.is_file() or _is_run(path):
            return path
    if Path(word).is_dir():
        raise UsageError(f"{word} is no run of fagen tune", f"it has neither {journal.META} nor {journal.TRIALS}")
    numbers = f"kept here: {', '.join(kept[-3:])}" if kept else f"none is kept in {runs}"
    raise UsageError(f"there is no run {word}", numbers, "give a run's folder, or nothing for the latest")


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in (journal.META, journal.TRIALS))


def read(path: Path) -> tuple[Row, list[Row], list[Row]]:
    """run.json, the candidates and the winners. A file of candidates has nothing but those."""
    try:
        if path.is_file():
            rows = list(journal.read_lines(path))
            if not any("outcome" in row for row in rows):
                raise UsageError(
                    f"{path} holds no candidates", f"their lines are like those of a run's {journal.TRIALS}"
                )
            return {}, rows, []
        meta = _meta(path / journal.META)
        return meta, list(journal.read_lines(path / journal.TRIALS)), list(journal.read_lines(path / journal.WINNERS))
    except OSError as error:
        raise FagenError(f"run {path} cannot be read", str(error)) from error


def _meta(path: Path) -> Row:
    """Missing or torn, it costs the page where and how the run was; of another version, its meaning is not known."""
    try:
        meta = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    if not isinstance(meta, dict):
        return {}
    if meta.get("schema", journal.SCHEMA) != journal.SCHEMA:
        numbers = f"schema {meta['schema']}, here {journal.SCHEMA}"
        raise UsageError(f"run {path.parent.name} was kept by another version of fagen", numbers)
    return meta


# ---- values that may be missing -------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_MOST < value < _MOST:
        return None
    return float(value)


def duration(value: Any) -> float | None:
    found = number(value)
    return found if found and found > 0 else None


def mapping(value: Any) -> Row:
    """A JSON object, without numbers that are none."""
    pairs = value.items() if isinstance(value, dict) else ()
    return {name: v for name, v in pairs if not isinstance(v, float) or math.isfinite(v)}


def moment(value: Any) -> float | None:
    """Seconds since 1970 of an ISO date; without a zone it is taken as UTC."""
    try:
        date = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


# ---- problems -------------------------------------------------------------------------------------------------------


def problem_of(fields: Any) -> Problem | None:
    """Of a dict as in run.json, or of a key."""
    try:
        return ops.problem_from(fields) if isinstance(fields, dict) else _of_key(str(fields))
    except (FagenError, ValueError):  # the second: thousands of digits
        return None


_KEY = re.compile(
    r"(?P<op>\w+)/(?P<dtype>\w+)/d(?P<d>\d+)(?:-(?P<dv>\d+))?/(?P<mask>[a-z]+)(?:-(?P<kind>\w+))?(?P<more>(?:/[a-z]+|/tf32)*)"
    r"/b(?P<b>\d+)/h(?P<h>\d+)-(?P<hk>\d+)/q(?P<q>\d+)-k(?P<k>\d+)(?:/w(?P<left>-?\d+),(?P<right>-?\d+))?"
)


def _of_key(key: str) -> Problem | None:
    """What a key says of its problem; head dims are those that the kernel was made for."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    words = found["more"].split("/")
    return Problem(
        op=found["op"], dtype=found["dtype"], head_dim=int(found["d"]), head_dim_v=int(found["dv"] or 0),
        mask=found["mask"], intervals=found["kind"] if found["kind"] in INTERVAL_KINDS else "",
        softcap="softcap" in words, alibi="alibi" in words, dropout="dropout" in words,
        tf32="tf32" in words,
        aligned="unaligned" not in words, batch=int(found["b"]), heads=int(found["h"]), kv_heads=int(found["hk"]),
        seqlen_q=int(found["q"]), seqlen_k=int(found["k"]),
        window_left=int(found["left"] or -1), window_right=int(found["right"] or -1),
    )  # fmt: skip


# ---- candidates -----------------------------------------------------------------------------------------------------


def candidate(row: Row) -> Row:
    """A line of trials.jsonl with every key there; times in seconds, None if there is none."""
    seconds = duration(row.get("seconds"))
    outcome = str(row.get("outcome") or ("ok" if seconds else "unknown"))
    device, config = mapping(row.get("device")), mapping(row.get("config"))
    return {
        "family": str(row.get("family") or _family(config)),
        "config": config,
        "outcome": outcome,
        "reason": str(row.get("reason") or ""),
        "seconds": seconds if outcome == "ok" else None,
        "spread": number(row.get("spread")),
        "samples": int(number(row.get("samples")) or 0),
        "error": number(row.get("error")),
        "facts": mapping(row.get("facts")),
        "source_hash": str(row.get("source_hash") or ""),
        "built": "source_hash" not in row or bool(row["source_hash"]),  # unless it is known not to have been
        "device": device,
        "throttled": throttled(device),
        "when": moment(row.get("date")),
    }


def _family(config: Row) -> str:
    """The family whose knobs these are, for rows that do not name it."""
    found = (f.name for f in families.all_families() if {knob.name for knob in f.knobs} == set(config))
    return next(found, "")


def throttled(device: Row) -> bool:
    """Whatever form the reason has: a flag, a word, a list of words, the bits of a mask."""
    value = device.get("throttle")
    return bool(value) and str(value).strip().lower() not in ("none", "no", "false", "0", "[]")


def by_problem(keys: Iterable[str], rows: list[Row], begun: float | None = None) -> dict[str, list[Row]]:
    """The candidates of each problem in their order: `n` counts those that were legal, `t` the seconds worked.

    A candidate that a constraint rejected cost nothing and has no number: its place (`at`) is between its neighbours'.
    """
    found: dict[str, list[Row]] = {key: [] for key in keys}
    last = begun  # when anything ended before this, or the run began
    clocks: dict[str, tuple[float, float | None]] = {}  # seconds worked so far, and when that was
    legal: dict[str, int] = {}
    for raw in rows:
        if "problem" not in raw:
            continue
        key, row = key_of(raw["problem"]), candidate(raw)
        illegal = row["outcome"] == "constraint"
        legal[key] = legal.get(key, 0) + (not illegal)
        row["n"] = row["at"] = None if illegal else legal[key]
        worked, before = clocks.get(key, (0.0, last))
        now, row["pause"] = row["when"], 0.0
        if now is not None and before is not None:
            passed = max(0.0, now - before)
            row["pause"] = passed if passed > PAUSE and key in clocks else 0.0
            worked += passed if passed <= PAUSE else 0.0
        row["t"] = worked if now is not None else None
        clocks[key] = (worked, now if now is not None else before)
        last = now if now is not None else last
        found.setdefault(key, []).append(row)
    for own in found.values():
        _between(own)
    return found


def _between(rows: list[Row]) -> None:
    """Places for the illegal ones: evenly between the numbers of the legal ones around them."""
    before, waiting = 0, []
    for row in [*rows, None]:
        if row is not None and row["n"] is None:
            waiting.append(row)
            continue
        for turn, illegal in enumerate(waiting, 1):
            illegal["at"] = round(before + turn / (len(waiting) + 1), 3)
        before, waiting = (row["n"] if row else before), []


def key_of(problem: Any) -> str:
    """Of a problem as a dict or as its key."""
    made = problem_of(problem) if isinstance(problem, dict) else None
    return made.key if made else str(problem)
