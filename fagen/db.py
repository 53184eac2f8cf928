"""The database of winners: one JSON file per arch and device, the shipped ones under the user's own overlay.

A key (`Problem.key`) has one winner a device and family; the overlay's wins over the shipped one. Reading for dispatch
never raises: what cannot be read is skipped and named in `Database.warnings`. `db_merge` writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fagen import env, schema
from fagen.errors import DatabaseError, FagenError, InvalidArgument, NewerDatabase
from fagen.problem import Problem
from fagen.schema import shown
from fagen.target import Target

SCHEMA = 1
MOST_BYTES = 64 << 20  # of a file; a record takes 2 KB
WEIGHTS = {"keys": 1.0, "waves": 1.0, "rows": 0.25}  # of the features of a size; see docs/database.md
MOST_WAVES, LEAST_WAVES = 4.0, 0.25  # beyond which their number no longer matters
WAVE_ROWS = 128  # of a block of rows, about


def slug(device: str) -> str:
    """A device's name as a file name: 'NVIDIA H200' -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Record:
    """A winner: which config, how fast, how exact, and where that was measured. Times in seconds.

    The constructor is the door: each field is of its type and domain (`_CHECKS`), whoever wrote it.
    """

    problem: Problem
    arch: str
    device: str
    family: str
    config: dict[str, Any]
    seconds: float
    spread: float  # half the interquartile range: the noise band of `seconds`
    default_seconds: float  # of the family's default config in the same round; 0: the default did not run
    error: float  # largest absolute error of the output when it was verified
    source_hash: str
    environment: dict[str, str] = field(default_factory=dict)
    date: str = ""
    trials: int = 0
    torch_seconds: float = 0.0  # of PyTorch's own attention in the same round; 0: it was not measured

    def __post_init__(self) -> None:
        if not isinstance(self.problem, Problem):
            raise DatabaseError(f"a record's problem is none: {shown(self.problem)}")
        for name, check in _CHECKS.items():
            wrong = check(getattr(self, name))
            if wrong:
                raise DatabaseError(f"record {self.key}: {name}: {wrong}")

    @property
    def key(self) -> str:
        return self.problem.key

    @property
    def speedup(self) -> float:
        return self.default_seconds / self.seconds if self.default_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file, whose head carries arch and device."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["arch"], fields["device"]
        return {**fields, "problem": self.problem.to_dict()}

    @classmethod
    def from_dict(cls, arch: str, device: str, fields: Any) -> Record:
        """Raises DatabaseError with what is wrong."""
        if not isinstance(fields, dict):
            raise DatabaseError(f"a record is no JSON object: {shown(fields)}")
        odd = (_REQUIRED - fields.keys()) | (fields.keys() - _REQUIRED - _OPTIONAL)
        if odd:
            raise DatabaseError("a record lacks a field or has one too many", ", ".join(map(shown, sorted(odd))))
        try:
            problem = Problem.from_dict(fields["problem"])
        except InvalidArgument as error:
            raise DatabaseError("a record's problem cannot be read", str(error).splitlines()[0]) from error
        return cls(**{**fields, "arch": arch, "device": device, "problem": problem})


_CHECKS: dict[str, Callable[[Any], str]] = {
    "arch": schema.arch, "device": schema.text, "family": schema.identifier, "config": schema.config,
    "seconds": schema.seconds, "spread": schema.spread, "default_seconds": schema.seconds_or_none,
    "error": schema.number, "source_hash": schema.source_hash, "environment": schema.environment,
    "date": schema.date, "trials": schema.integer, "torch_seconds": schema.seconds_or_none,
}  # fmt: skip
_OPTIONAL = {"environment", "date", "trials", "torch_seconds"}
_REQUIRED = {f.name for f in dataclasses.fields(Record)} - {"arch", "device"} - _OPTIONAL


def environment(target: Target) -> dict[str, str]:
    """What a time depends on besides the kernel, kept in each record. Missing facts are left out."""
    import platform

    import torch

    import fagen

    facts = {"fagen": getattr(fagen, "__version__", ""), "torch": torch.__version__, "device": target.device}
    facts |= {"python": platform.python_version(), "units": str(target.units)}
    with contextlib.suppress(ImportError, OSError, FagenError):
        from fagen import toolchain

        compiler = toolchain.nvcc() if target.is_gpu else toolchain.cxx()
        if compiler:
            facts["nvcc" if target.is_gpu else "cxx"] = str(toolchain.compiler_version(compiler)).splitlines()[0]
    if target.is_gpu:
        with contextlib.suppress(OSError):
            line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
            facts["driver"] = next(iter(re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", line)), "")
    return {name: schema.printable(value) for name, value in facts.items() if value}


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


def put(records: Iterable[Record], directory: Path | None = None, policy: str = "newer") -> list[Path]:
    """Merge records into the user's overlay (or another folder); the files written."""
    from fagen.db_merge import merge

    return merge(records, directory, policy).written


# ---- lookup ---------------------------------------------------------------------------------------------------------


def features(problem: Problem, units: int, most_waves: float = MOST_WAVES) -> dict[str, float]:
    """What of a size point decides which config wins, in doublings; WEIGHTS says how much each counts.

    `keys` that a row sees: the length of the inner loop, and how much of the keys and values a cache holds. `waves`:
    blocks of rows over the device's units; with few of them plain schedules and small tiles win, with many it no
    longer matters how many. `rows` of a sequence: how much of the work lies at the diagonal.

    `Features` of csrc/table.h is the same in C++, for calls of a new size.
    """
    p = problem
    left, right = (p.seqlen_k if bound < 0 else bound for bound in (p.window_left, p.window_right))
    keys = p.seqlen_k if p.mask == "causal" else min(p.seqlen_k, left + right + 1)
    waves = p.batch * p.heads * -(-p.seqlen_q // WAVE_ROWS) / max(1, units)
    return {
        "keys": math.log2(keys),
        "waves": math.log2(min(max(waves, LEAST_WAVES), most_waves)),
        "rows": math.log2(p.seqlen_q),
    }


def differences(a: Problem, b: Problem, units: int) -> dict[str, float]:
    """How far two size points are apart on a device of so many units, in weighted doublings of each feature."""
    others = features(b, units)
    return {name: WEIGHTS[name] * abs(value - others[name]) for name, value in features(a, units).items()}


def distance(a: Problem, b: Problem, units: int) -> float:
    """The sum of the differences; 0 where two size points differ in nothing that counts."""
    total = 0.0
    for difference in differences(a, b, units).values():  # one rounding after the other, as C++ adds: sum() has fewer
        total += difference
    return total


_Signature = tuple[tuple[str, int, int, int], ...]
_cache: dict[tuple[Path, ...], tuple[_Signature, Database]] = {}


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

    def candidates(self, problem: Problem, target: Target) -> Iterator[tuple[Record, str]]:
        """Records that may serve, best first: "exact", then "nearest" on this device, then "arch" on others.

        Where several families have a record of the same size, the fastest comes first.
        """
        device = slug(target.device)
        rows = self._by_static.get((target.arch, problem.static_key), ())

        def order(record: Record) -> tuple[bool, bool, float, str, float]:
            elsewhere, other = slug(record.device) != device, record.key != problem.key
            return elsewhere, other, distance(problem, record.problem, target.units), record.key, record.seconds

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
