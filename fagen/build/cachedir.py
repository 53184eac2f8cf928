"""The folder of built kernels, and the scratch folders of builds: made for one user, known as fagen's, safe to load.

What lies in the cache is native code that gets loaded. Folders and files are made for this user alone, whatever the
umask; a path that another user owns or may write is refused. A mark tells a folder that fagen made from any other,
only what has fagen's own name in a marked folder is ever removed, and no symbolic link is followed on the way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from fagen import env
from fagen.errors import CacheError

MARK = "CACHEDIR.TAG"  # backup programs know the name and the first line, and leave such folders out
_MARK_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# Made by fagen. It can be removed: fagen makes it again.\n"
FOLDERS = ("kernels", "failed", "locks", "tmp", "verified")
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.fagen")  # a file that `write` has not renamed yet
_SCRATCH = re.compile(r"fagen-[0-9a-f]{12}")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


# ---- what may be loaded -------------------------------------------------------------------------------------------


def guard(path: Path, *, folder: bool = False) -> os.stat_result:
    """Refuse a link, and what another user owns or may write. OSError: it is not there, or no file (no folder)."""
    facts = os.lstat(path)
    if stat.S_ISLNK(facts.st_mode):
        raise CacheError(
            f"{path} is a symbolic link: no kernel is loaded through one",
            f"it leads to {os.path.realpath(path)}",
            "remove the link, or set FAGEN_CACHE_DIR to where the folder is",
        )
    if facts.st_uid not in (os.geteuid(), 0):
        raise CacheError(
            f"{path} belongs to another user: no kernel is loaded from there",
            f"owner {facts.st_uid}, this process runs as {os.geteuid()}",
            "set FAGEN_CACHE_DIR to a folder of your own",
        )
    if facts.st_mode & _OTHERS_WRITE:
        raise CacheError(
            f"other users may write {path}: no kernel is loaded from there",
            f"mode {stat.S_IMODE(facts.st_mode):04o}, owner {facts.st_uid}",
            f"if you trust what lies there: chmod -R go-w {shlex.quote(str(env.cache_dir()))}; "
            "else set FAGEN_CACHE_DIR to another folder",
        )
    if folder and not stat.S_ISDIR(facts.st_mode):
        raise NotADirectoryError(f"{path} is no folder")
    if not folder and not stat.S_ISREG(facts.st_mode):
        raise OSError(f"{path} is no file")
    return facts


def guard_root() -> Path:
    """The cache's folder. It may be reached through links; nobody else may be able to put another in its place."""
    root = env.cache_dir()
    real = Path(os.path.realpath(root))
    guard(real, folder=True)
    for path in dict.fromkeys([root, *root.parents, *real.parents]):
        facts = os.lstat(path)
        mode = facts.st_mode
        if stat.S_ISLNK(mode) and facts.st_uid not in (os.geteuid(), 0):
            raise CacheError(
                f"another user may replace the cache {root}: no kernel is loaded from there",
                f"the link {path} belongs to {facts.st_uid}, this process runs as {os.geteuid()}",
                "set FAGEN_CACHE_DIR to where the folder is",
            )
        if not stat.S_ISLNK(mode) and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise CacheError(
                f"anybody may replace the cache {root}: no kernel is loaded from there",
                f"{path} has mode {stat.S_IMODE(mode):04o}, without the sticky bit",
                f"chmod o-w {shlex.quote(str(path))}, or set FAGEN_CACHE_DIR to a folder elsewhere",
            )
    return root


def guard_entry(path: Path) -> None:
    """A folder two levels below the cache's own, and those it lies in."""
    guard_root()
    guard(path.parent, folder=True)
    guard(path, folder=True)


# ---- what is fagen's own ------------------------------------------------------------------------------------------


def _has_mark(folder: Path) -> bool:
    try:
        if not stat.S_ISREG(os.lstat(folder / MARK).st_mode):
            return False
        with open(folder / MARK, "rb") as file:
            return file.read(len(_MARK_TEXT)) == _MARK_TEXT
    except OSError:
        return False


def _require_own(root: Path) -> None:
    """Marked, or as an older fagen left it, or empty. Anything else is somebody's folder that was named by mistake."""
    if _has_mark(root):
        return
    known = {*FOLDERS, "lost+found"}
    others = sorted(name for name in os.listdir(root) if name not in known and not _TEMPORARY.fullmatch(name))
    if others and not _has_mark(root):  # another process may have put its mark there meanwhile
        raise CacheError(
            f"{root} is no cache of fagen, and it is not empty: nothing is built, loaded or removed there",
            f"it holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}",
            "set FAGEN_CACHE_DIR to a folder of its own, one that is empty or that does not exist",
        )


def existing(name: str) -> Path | None:
    """One of the cache's folders to look into, if it is there."""
    try:
        root = guard_root()
        _require_own(root)
        guard(root / name, folder=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return root / name


def folder(name: str) -> Path:
    """One of the cache's folders to write into, made if need be. OSError: it cannot be had."""
    root = env.cache_dir()
    make(root)
    guard_root()
    _require_own(root)
    make(root / name)
    guard(root / name, folder=True)
    if not _has_mark(root):
        write(root / MARK, _MARK_TEXT)
    return root / name


def make(path: Path) -> None:
    """A folder, and those above it, for this user alone."""
    if not path.is_dir():
        if path.parent != path:
            make(path.parent)
        with contextlib.suppress(FileExistsError):  # another process was quicker, or guard says what is in the way
            os.mkdir(path, 0o700)


def write(path: Path, data: bytes) -> None:
    """A file for this user alone; whole, or not there at all."""
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.fagen")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with open(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


# ---- scratch folders ----------------------------------------------------------------------------------------------


class Scratch:
    """A folder that its maker removes; if the maker was killed, a later build does.

    Its mark is locked as long as the maker lives, which holds across containers and hosts where a pid says nothing.
    """

    def __init__(self, parent: Path) -> None:
        self._pid = os.getpid()
        self.path = parent / f"fagen-{uuid.uuid4().hex[:12]}"
        os.mkdir(self.path, 0o700)
        unlocked = self.path / "mark"
        self._lock = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # no locks, or no space: then without a mark, and nobody else removes it
            os.write(self._lock, _MARK_TEXT)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.rename(unlocked, self.path / MARK)

    def remove(self) -> None:
        """A forked copy of the maker leaves the folder alone."""
        if self._pid == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a moment, in the system's place for temporary files."""
    made = Scratch(Path(tempfile.gettempdir()))
    try:
        yield made.path
    finally:
        made.remove()


def sweep(parent: Path) -> None:
    """Remove the scratch folders of makers that were killed."""
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            if _SCRATCH.fullmatch(name):
                with contextlib.suppress(OSError):  # gone already, or its maker lives
                    _remove_abandoned(parent / name)


def _remove_abandoned(path: Path) -> None:
    facts = os.lstat(path)
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or not _has_mark(path):
        return
    lock = os.open(path / MARK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
