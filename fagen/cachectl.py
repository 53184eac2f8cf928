"""The folder of built kernels, as people look after it: what is there, what is damaged, how to empty it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fagen import build, env
from fagen.errors import FagenError


@dataclass(frozen=True)
class Entry:
    path: Path
    bytes: int
    intact: bool


def _size(path: Path) -> int:
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # another process removed it
            continue
    return total


def _children(name: str) -> list[Path]:
    folder = env.cache_dir() / name
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise FagenError(f"the cache {folder} cannot be read", str(error)) from error


def entries() -> list[Entry]:
    """Every built kernel, its files checked against its manifest."""
    return [Entry(path, _size(path), build.read_entry(path) is not None) for path in _children("kernels")]


def failed() -> list[Path]:
    """Source and log of builds that failed, kept for whoever wants to read them."""
    return _children("failed")


def remove(paths: list[Path]) -> int:
    """Bytes freed. Builds under way in other processes are not touched: they live elsewhere until published."""
    freed = 0
    for path in paths:
        size = _size(path)
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise FagenError(f"{path} cannot be removed", str(error)) from error
        freed += size
    return freed


def clear() -> tuple[int, int]:
    """(entries removed, bytes freed): all kernels, what failed builds left, and verdicts about changed sources."""
    paths = _children("kernels") + failed()
    return len(paths), remove(paths) + remove(_children("verified"))
