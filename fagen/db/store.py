"""The database of winners: one JSON file per arch and device, the shipped ones under the user's own overlay.

A key (`Problem.key`) has one winner a device and family; the overlay's wins over the shipped one. Reading for dispatch
never raises: what cannot be read is skipped and named in `Database.warnings`. `db_merge` writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fagen import env, ops, schema
from fagen.db.record import SCHEMA, Record, slug
from fagen.errors import DatabaseError, NewerDatabase
from fagen.ops.base import Problem
from fagen.schema import shown
from fagen.target import Target

MOST_BYTES = 64 << 20  # of a file; a record takes 2 KB


# ---- files ----------------------------------------------------------------------------------------------------------


def path_of(directory: Path, arch: str, device: str) -> Path:
    """ARCH/DEVICE.json in the folder; never outside of it, whatever the names are."""
    wrong = schema.arch(arch) or schema.text(device)
    if wrong:
        raise DatabaseError("there is no database file of this arch and device", wrong)
    return directory / arch / f"{slug(device)}.json"


def default_paths() -> tuple[Path, Path]:
    """Where records are read from, the shipped ones first."""
    return env.data_dir("tuning_db"), env.user_db_dir()


def owner(origin: Path | None) -> str:
    """Whose a file is."""
    return "yours" if origin is not None and origin.is_relative_to(env.user_db_dir()) else "shipped"


def files(directory: Path) -> list[Path]:
    """ARCH/DEVICE.json, whatever they are; what cannot be listed has none."""
    return [path for arch in _entries(directory) for path in _entries(arch) if path.suffix == ".json"]


def _entries(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder))]
    except OSError:  # no folder, not ours to read, a loop of links
        return []


@dataclass(frozen=True)
class File:
    """A database file: its head, its records, and what is wrong with others in it."""

    arch: str
    device: str
    records: list[Record]
    wrong: list[str]


def read_file(path: Path) -> tuple[list[Record], list[str]]:
    """The records of a file and what is wrong with others in it. Raises DatabaseError when nothing can be used."""
    file = open_file(path)
    return file.records, file.wrong


def open_file(path: Path) -> File:
    """As read_file, with the head."""
    try:
        content = json.loads(_bytes(path), object_pairs_hook=_object)
    except OSError as error:
        raise DatabaseError(f"database file {path} cannot be read", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise DatabaseError(
            f"database file {path} is damaged", f"not JSON: {error}", "Restore it, or delete it and tune again."
        ) from error
    version = content.get("schema") if isinstance(content, dict) else None
    if type(version) is not int:
        raise DatabaseError(f"{path} is no fagen database", "it has no schema number", "Move it out of the folder.")
    if version > SCHEMA:
        raise NewerDatabase(
            f"database file {path} comes from a newer fagen",
            f"its schema is {shown(version)}, this fagen knows {SCHEMA}",
            "Upgrade fagen, or set FAGEN_DB_DIR to another folder.",
        )
    arch, device, rows = content.get("arch"), content.get("device"), content.get("records")
    wrong = schema.arch(arch) or schema.text(device) or ("" if isinstance(rows, list) else "it has no list of records")
    if wrong:
        raise DatabaseError(f"database file {path} is damaged", wrong)
    found = File(arch, device, [], [])
    for index, row in enumerate(rows):
        try:
            found.records.append(Record.from_dict(arch, device, row))
        except DatabaseError as error:
            found.wrong.append(f"{path}: record {index} is skipped: {' '.join(str(error).splitlines())}")
    return found


def _bytes(path: Path) -> bytes:
    """Of a regular file of sane size. A pipe without a writer does not hold us up, and nothing else is read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DatabaseError(f"database file {path} is no regular file", remedy="Move it out of the folder.")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MOST_BYTES + 1) if status.st_size <= MOST_BYTES else b""
        if status.st_size > MOST_BYTES or len(data) > MOST_BYTES:
            size = f"{max(status.st_size, len(data)) >> 20} MiB, read are at most {MOST_BYTES >> 20}"
            raise DatabaseError(f"database file {path} is too large", size, "Move it out of the folder, or split it.")
        return data
    finally:
        os.close(descriptor)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object. One that names a key twice means nothing in particular, so that no check takes it."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else "an object with a key twice"


_Signature = tuple[tuple[str, int, int, int], ...]
_cache: dict[tuple[Path, ...], tuple[_Signature, Database]] = {}

ELSEWHERE = 1.0  # how much farther a record of another device counts: as one of half or twice the keys


class Database:
    """The records of some folders, later folders winning. Immutable."""

    def __init__(self) -> None:
        self._winners: dict[tuple[str, str, str, str], tuple[Record, Path]] = {}
        self._by_static: dict[tuple[str, str], list[Record]] = {}
        self.warnings: list[str] = []

    @classmethod
    def load(cls, paths: Sequence[Path] | None = None) -> Database:
        """Read once a process; read again when a file was added, removed or replaced."""
        folders = tuple(default_paths() if paths is None else paths)
        signature = _signature(folders)
        held = _cache.get(folders)
        if held and held[0] == signature:
            return held[1]
        database = cls()
        for folder in folders:
            for path in files(folder):
                database._add_file(path)
        for (arch, *_), (record, _) in sorted(database._winners.items()):
            database._by_static.setdefault((arch, record.problem.static_key), []).append(record)
        _cache[folders] = signature, database
        return database

    def _add_file(self, path: Path) -> None:
        try:
            records, wrong = read_file(path)
        except DatabaseError as error:
            self.warnings.append(" ".join(str(error).splitlines()))
            return
        self.warnings += wrong
        for record in records:
            self._winners[record.arch, slug(record.device), record.key, record.family] = record, path

    @property
    def records(self) -> list[Record]:
        return [record for record, _ in self._winners.values()]

    def origin(self, record: Record) -> Path | None:
        """The file that a record was read from."""
        held = self._winners.get((record.arch, slug(record.device), record.key, record.family))
        return held[1] if held else None

    def candidates(
        self, problem: Problem, target: Target, *, every_regime: bool = False
    ) -> Iterator[tuple[Record, str]]:
        """Records that may serve, the nearest first: "exact", "nearest" on this device, "arch" on others, farther by
        ELSEWHERE.

        Where several families have a record of the same size, the fastest comes first. With `every_regime`
        those that serve sizes of another regime than the problem's are among them.
        """
        device = slug(target.device)
        rows = self._by_static.get((target.arch, problem.static_key), ())

        op = ops.get(problem.op)
        regime = op.regime(problem, target)
        if not every_regime:
            rows = [record for record in rows if op.regime(record.problem, target) == regime]

        def order(record: Record) -> tuple[float, bool, bool, str, float]:
            elsewhere, other = slug(record.device) != device, record.key != problem.key
            distance = op.distance(problem, record.problem, target.units) + ELSEWHERE * elsewhere
            return distance, elsewhere, other, record.key, record.seconds

        for record in sorted(rows, key=order):
            if slug(record.device) != device:
                yield record, "arch"
            else:
                yield record, "exact" if record.key == problem.key else "nearest"

    def find(self, problem: Problem, target: Target) -> tuple[Record, str] | None:
        return next(self.candidates(problem, target), None)


def _signature(folders: tuple[Path, ...]) -> _Signature:
    rows = []
    for folder in folders:
        for path in files(folder):
            with contextlib.suppress(OSError):
                stat = path.stat()
                rows.append((str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(rows)
