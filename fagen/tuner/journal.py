"""A run's folder: what was asked (run.json), every candidate's end (trials.jsonl), the winners (winners.jsonl).

trials.jsonl is the truth about a run: a line is appended and synced before anything else learns of it, so that a run
that is killed at any moment loses what is in flight and no more. Optuna's journal beside it is rebuilt from it.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from fagen.errors import FagenError, UsageError

TRIALS, WINNERS, META, STUDY, LOG = "trials.jsonl", "winners.jsonl", "run.json", "study.journal", "workers.log"
SCHEMA = 1


class Run:
    """An open run; no other process has it open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = filelock.FileLock(path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise FagenError(f"run {path} belongs to another process", "", "wait for it, or start a new run") from error
        for name in (TRIALS, WINNERS):
            _cut_torn_tail(path / name)

    @classmethod
    def create(cls, runs: Path, label: str, meta: dict[str, Any]) -> Run:
        stamp = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{label}"
        for attempt in range(100):
            path = runs / (f"{stamp}-{attempt}" if attempt else stamp)
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise FagenError(f"no run can be kept in {runs}", str(error), "set XDG_STATE_HOME") from error
            _write_meta(path, {"schema": SCHEMA, **meta})
            return cls(path)
        raise FagenError(f"no new run can be made in {runs}")

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> Run:
        """An earlier run of the same problems, target and sources."""
        meta = _meta(path)
        if meta is None:
            raise UsageError(f"{path} is no run of fagen tune", f"it has no readable {META}")
        if meta.get("schema") != SCHEMA:
            raise UsageError(f"run {path.name} was kept by another version of fagen", f"schema {meta.get('schema')}")
        if meta.get("fingerprint") != fingerprint:
            raise UsageError(
                f"run {path.name} was of other problems, another target or other kernel sources",
                f"fingerprint {meta.get('fingerprint')}, now {fingerprint}",
                "give the same problem flags, or start a new run without --resume",
            )
        return cls(path)

    def close(self) -> None:
        self._lock.release()

    @property
    def meta(self) -> dict[str, Any]:
        """What run.json says."""
        return _meta(self.path) or {}

    def describe(self, **facts: Any) -> None:
        """Add to what run.json says."""
        meta = self.meta
        if any(meta.get(name) != value for name, value in facts.items()):
            _write_meta(self.path, meta | facts)

    def append(self, name: str, row: dict[str, Any]) -> None:
        try:
            with open(self.path / name, "ab") as file:
                file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unkept(self.path, error) from error

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        return read_lines(self.path / name)


def latest(runs: Path, fingerprint: str) -> Path | None:
    """The newest run of this fingerprint."""
    wanted = {"schema": SCHEMA, "fingerprint": fingerprint}.items()
    found = [p.parent for p in runs.glob(f"*/{META}") if wanted <= (_meta(p.parent) or {}).items()]
    return max(found, key=lambda path: path.name, default=None)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole; a torn one is skipped."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the second: a nest too deep
            continue
        if isinstance(row, dict):
            yield row


def _unkept(path: Path, error: OSError) -> FagenError:
    return FagenError(f"run {path} cannot be kept", str(error), "free some space, then go on with --resume")


def _write_meta(path: Path, meta: dict[str, Any]) -> None:
    temporary = path / (META + ".part")
    try:
        temporary.write_text(json.dumps(meta, indent=1))
        os.replace(temporary, path / META)
    except OSError as error:
        raise _unkept(path, error) from error


def _meta(path: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((path / META).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) else None


def _cut_torn_tail(path: Path) -> None:
    """Drop a last line that was being written when its process was killed, before another is appended to it."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    if data and not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
