"""The folder of built kernels, as people look after it: what is there, what is damaged, how to empty it."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fagen import env
from fagen.build import cache, cachedir
from fagen.build.job import LIBRARY, LOG, MANIFEST, SOURCES
from fagen.errors import CacheError, FagenError

_ENTRY = re.compile(r"[\w.-]+-[0-9a-f]{16}")  # of `kernels` and `failed`
_VERDICT = re.compile(r"\.?[\w.-]+\.(json|lock|begun)(\.\d+)?|\.[0-9a-f]{12}\.fagen")
_FILES = (*SOURCES, LIBRARY, LOG, MANIFEST)


@dataclass(frozen=True)
class CacheEntry:
    path: Path
    bytes: int
    intact: bool
    refused: CacheError | None = None  # why it is not loaded, whole or not


def _size(path: Path) -> int:
    """Of a file, or of the files of an entry; no link is followed."""
    total = 0
    for file in [path, *(path / name for name in _FILES)]:
        with contextlib.suppress(OSError):
            facts = os.lstat(file)
            total += facts.st_size if stat.S_ISREG(facts.st_mode) else 0
    return total


def _children(name: str) -> list[Path]:
    try:
        folder = cachedir.existing(name)
        return sorted(folder.iterdir()) if folder else []
    except OSError as error:
        raise FagenError(f"the cache {env.cache_dir() / name} cannot be read", str(error)) from error


def _entries(name: str) -> list[Path]:
    return [path for path in _children(name) if _ENTRY.fullmatch(path.name)]


def entries() -> list[CacheEntry]:
    """Every built kernel, its files checked against its manifest."""
    return [_entry(path) for path in _entries("kernels")]


def _entry(path: Path) -> CacheEntry:
    try:
        return CacheEntry(path, _size(path), cache.read_entry(path) is not None)
    except CacheError as error:
        return CacheEntry(path, _size(path), False, error)


def failed() -> list[Path]:
    """Source and log of builds that failed, kept for whoever wants to read them."""
    return _entries("failed")


def foreign() -> list[Path]:
    """What lies among the kernels and is not fagen's."""
    return [path for name in ("kernels", "failed") for path in _children(name) if not _ENTRY.fullmatch(path.name)]


def remove(paths: list[Path]) -> tuple[int, int, list[Path]]:
    """(entries removed, bytes freed, what was left): of an entry the files that a build makes, and nothing else.

    Builds under way in other processes are not touched: they live elsewhere until published.
    """
    removed = freed = 0
    left = []
    for path in paths:
        size = _size(path)
        try:
            gone = _remove(path)
        except OSError as error:
            raise FagenError(f"{path} cannot be removed", str(error)) from error
        if gone:
            removed, freed = removed + 1, freed + size
        else:
            left.append(path)
    return removed, freed, left


def _remove(path: Path) -> bool:
    """False if it is not this user's own, or holds what fagen did not put there."""
    try:
        facts = os.lstat(path)
        if facts.st_uid != os.geteuid():
            return False
        if stat.S_ISREG(facts.st_mode):
            path.unlink()
            return True
        if not stat.S_ISDIR(facts.st_mode) or {file.name for file in path.iterdir()} - {*_FILES}:
            return False
        for name in _FILES:
            (path / name).unlink(missing_ok=True)
        path.rmdir()
    except FileNotFoundError:  # another process removed it
        pass
    return True


def clear() -> tuple[int, int, list[Path]]:
    """All kernels, what failed and killed builds left, and verdicts about changed sources; as `remove` answers."""
    removed, freed, left = remove(_entries("kernels") + failed())
    verdicts = [path for path in _children("verified") if _VERDICT.fullmatch(path.name)]
    _, more, _ = remove(verdicts)
    scratch = cachedir.existing("tmp")
    for folder in (scratch, Path(tempfile.gettempdir())):
        if folder:
            cachedir.sweep(folder)
    return removed, freed + more, left + foreign()
