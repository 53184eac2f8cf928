"""Writing winners: who stays where two files have a record of the same key, and files that lose nothing.

Writers lock, re-read, merge and replace, so that any number of them may write at the same time. Arch and device are
hard: they name the file, and records never cross from one to another. What else was different where a record was
measured (driver, compiler, clocks) is told, and does not keep it out.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fagen import env, families
from fagen.db import audit
from fagen.db.record import SCHEMA, Record, slug
from fagen.db.store import open_file, path_of, read_file
from fagen.errors import DatabaseError, FagenError, NewerDatabase, UsageError
from fagen.timing.timer import LEAST_GAIN


def put(records: Iterable[Record], directory: Path | None = None, policy: str = "newer") -> list[Path]:
    """Merge records into the user's overlay (or another folder); the files written."""
    from fagen.db.merge import merge

    return merge(records, directory, policy).written


POLICIES = {
    "newer": "the record with the later date",
    "faster": "the one that is faster by more than the noise of both; among equals the one of fewer resources",
    "keep": "the record that is already there",
}
_LOCK_SECONDS = 60
_SOFT_IGNORED = ("device", "python")  # of an environment: the first is hard, the second changes no kernel


@dataclass(frozen=True)
class Decision:
    """What became of an incoming record, and of the one that it met, if any."""

    action: str  # added, replaced or kept
    new: Record
    old: Record | None
    reason: str


@dataclass
class Merge:
    decisions: list[Decision] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    def count(self, action: str) -> int:
        return sum(decision.action == action for decision in self.decisions)

    def differences(self) -> dict[str, int]:
        """Facts of the environment in which records that met were not measured alike, and how many pairs."""
        found: dict[str, int] = {}
        for d in self.decisions:
            if d.old is None or d.old == d.new:
                continue
            for name in sorted(d.old.environment.keys() & d.new.environment.keys()):
                old, new = d.old.environment[name], d.new.environment[name]
                if name not in _SOFT_IGNORED and old != new:
                    text = f"{name} {old} and {new}"
                    found[text] = found.get(text, 0) + 1
        return found


# ---- who stays ------------------------------------------------------------------------------------------------------


def noise(a: Record, b: Record) -> float:
    """Seconds below which two records' times count as equal."""
    return max(math.hypot(a.spread, b.spread), LEAST_GAIN * max(a.seconds, b.seconds))


def decide(old: Record, new: Record, policy: str) -> Decision:
    """Whether `new` takes the place of `old`. One that today's templates still make stays before one they do not."""
    if old == new:
        return Decision("kept", new, old, "the same record")
    if policy == "keep":
        return Decision("kept", new, old, "there already")
    usable = [audit.state(record)[0] == "current" for record in (old, new)]
    if usable == [True, False]:
        return Decision("kept", new, old, "the other was tuned with a kernel source that is not today's")
    if usable == [False, True]:
        return Decision("replaced", new, old, "the old one was tuned with a kernel source that is not today's")
    if policy == "newer":
        later = new.date >= old.date
        return Decision("replaced" if later else "kept", new, old, f"{new.date or 'no date'}, was {old.date}")
    gain, band = old.seconds - new.seconds, noise(old, new)
    percent = f"{abs(gain) / old.seconds:.1%} {'faster' if gain > 0 else 'slower'}"
    if abs(gain) > band:
        return Decision("replaced" if gain > 0 else "kept", new, old, percent)
    fewer = old.config != new.config and _rank(new) < _rank(old)
    reason = f"{percent}, within the noise of {band / old.seconds:.1%}"
    return Decision("replaced" if fewer else "kept", new, old, reason + (", of fewer resources" if fewer else ""))


def _rank(record: Record) -> tuple[int, tuple, str]:
    """The stable rule among ties, as at the end of a tuning run; what cannot be ranked comes last."""
    text = json.dumps(record.config, sort_keys=True)
    try:
        family = families.get(record.family)
        target = audit.target_of(record)
        return 0, family.resources(record.problem, target, family.config(record.config)), text
    except FagenError:
        return 1, (), text


def merge(
    records: Iterable[Record], directory: Path | None = None, policy: str = "newer", *, dry_run: bool = False
) -> Merge:
    """Merge records into the user's overlay (or another folder). A dry run decides and writes nothing."""
    if policy not in POLICIES:
        raise UsageError(f"unknown merge policy {policy!r}", f"known: {', '.join(POLICIES)}")
    directory, done = directory or env.user_db_dir(), Merge()
    for path, rows in _by_file(records, directory).items():
        arch, device = rows[0].arch, rows[0].device
        with contextlib.nullcontext() if dry_run else _locked(path):
            held, damaged = _held(path, arch, device)
            merged = {(r.key, r.family): r for r in held}
            for record in rows:
                old = merged.get((record.key, record.family))
                decision = decide(old, record, policy) if old else Decision("added", record, None, "")
                done.decisions.append(decision)
                if decision.action != "kept":
                    merged[record.key, record.family] = record
            if not dry_run:
                if damaged:
                    _keep_aside(path)
                write_file(path, arch, device, merged.values())
                done.written.append(path)
    return done


def _by_file(records: Iterable[Record], directory: Path) -> dict[Path, list[Record]]:
    groups: dict[Path, list[Record]] = {}
    for record in records:
        path = path_of(directory, record.arch, record.device)
        group = groups.setdefault(path, [])
        _require_same(path, (record.arch, record.device), *((r.arch, r.device) for r in group[:1]))
        group.append(record)
    return groups


def remove(path: Path, doomed: Callable[[Record], bool]) -> int:
    """Take records out of a file, and those that a later one hides; how many. The last one takes the file along."""
    with _locked(path):
        records, wrong = read_file(path)
        kept = {(r.key, r.family): r for r in records if not doomed(r)}
        if wrong:
            _keep_aside(path)
        if kept:
            write_file(path, records[0].arch, records[0].device, kept.values())
        else:
            path.unlink(missing_ok=True)
    return len(records) - len(kept)


# ---- how two differ -------------------------------------------------------------------------------------------------


def diff(a: Iterable[Record], b: Iterable[Record]) -> list[dict[str, Any]]:
    """A row for each record that is not in both alike: `what` is "only a", "only b", "config" or "time".

    Times count as different beyond the noise of both; `ratio` is a's time over b's. A config that differs is told
    whatever the times say.
    """
    sides = [{(r.arch, slug(r.device), r.key, r.family): r for r in records} for records in (a, b)]
    rows = []
    for key in sorted(sides[0].keys() | sides[1].keys()):
        one, other = (side.get(key) for side in sides)
        row: dict[str, Any] = {"arch": key[0], "device": key[1], "key": key[2], "family": key[3]}
        if one is None or other is None:
            rows.append({**row, "what": "only b" if one is None else "only a"})
            continue
        beyond = abs(one.seconds - other.seconds) > noise(one, other)
        changed = {name: [one.config.get(name), other.config.get(name)]
                   for name in one.config.keys() | other.config.keys()
                   if one.config.get(name) != other.config.get(name)}  # fmt: skip
        if changed or beyond:
            row |= {"what": "config" if changed else "time", "ratio": one.seconds / other.seconds}
            rows.append({**row, "beyond_noise": beyond, "changed": dict(sorted(changed.items()))})
    return rows


# ---- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock"), timeout=_LOCK_SECONDS):
            yield
    except filelock.Timeout as error:
        raise DatabaseError(
            f"database file {path} is locked by another process", f"waited {_LOCK_SECONDS} s", "Try again."
        ) from error
    except OSError as error:
        raise DatabaseError(
            f"database file {path} cannot be written", str(error), "Set FAGEN_DB_DIR to a folder you can write to."
        ) from error


def write_new(path: Path, records: list[Record]) -> None:
    """These records of one device as a file, in the place of one of the same device. Any other file is not touched."""
    arch, device = records[0].arch, records[0].device
    with _locked(path):
        if os.path.lexists(path):
            held = open_file(path)
            _require_same(path, (arch, device), (held.arch, held.device))
            if held.wrong:
                _keep_aside(path)
        write_file(path, arch, device, records)


def write_file(path: Path, arch: str, device: str, records: Iterable[Record]) -> None:
    """All or nothing: a reader sees the old file or the new one."""
    rows = [r.to_dict() for r in sorted(records, key=lambda r: (r.key, r.family))]
    text = json.dumps({"schema": SCHEMA, "arch": arch, "device": device, "records": rows}, indent=1, allow_nan=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def require_writable(directory: Path, arch: str, device: str) -> None:
    """Raises DatabaseError now if a record could not be put into this folder later. Changes nothing."""
    path = path_of(directory, arch, device)
    _held(path, arch, device)
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise DatabaseError(
            f"database file {path} cannot be written", f"{folder} is no folder that this user can write to",
            "Set FAGEN_DB_DIR, or give --out, a folder you can write to.",
        )  # fmt: skip


def _held(path: Path, arch: str, device: str) -> tuple[list[Record], bool]:
    """The records of a file about to be replaced, and whether there is more in it that must be kept beside it.

    Raises for one of a newer fagen or of another device: that is not touched.
    """
    if not os.path.lexists(path):
        return [], False
    try:
        held = open_file(path)
    except NewerDatabase:
        raise
    except DatabaseError:
        return [], True
    _require_same(path, (arch, device), (held.arch, held.device))
    return held.records, bool(held.wrong)


def _require_same(path: Path, new: tuple[str, str], *others: tuple[str, str]) -> None:
    for old in others:
        if old != new:
            raise DatabaseError(
                f"database file {path} is of another device",
                f"it is of {old[1]} ({old[0]}), the records are of {new[1]} ({new[0]})",
                "Merge into another folder: --out DIR.",
            )


def _keep_aside(path: Path) -> None:
    """Under another name beside it, whatever it is. By a link where that can be, so that readers always find a file."""
    stamp = f".damaged-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for turn in itertools.count():
        aside = path.with_suffix(f"{stamp}-{turn}" if turn else stamp)
        if os.path.lexists(aside):
            continue
        try:
            os.link(path, aside, follow_symlinks=False)
        except OSError:  # a folder, or a file system without links
            os.rename(path, aside)
        return
