"""Source to shared library, through torch's cpp_extension, in a cache addressed by content.

An entry is a folder named for the hash of all that can change the binary. It is built in a private folder and
published by one rename, its manifest written last; an entry whose manifest does not match its files is a miss, one
that another user could have written is refused. Locks only avoid double work: nothing is wrong without them, and
nobody waits for ever on one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from fagen import env, ops
from fagen.build import cachedir
from fagen.build.compiler import parse_ptxas, run_build
from fagen.build.job import KEY_SCHEMA, LIBRARY, LOG, MANIFEST, SOURCES, Artifact, Job, make_job
from fagen.codegen.spec import KernelSpec
from fagen.errors import BuildError, CacheError, FagenError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fagen.families import Family
    from fagen.target import Target

DEFAULT_TIMEOUT = 900.0
_LISTINGS = [{source, LIBRARY, LOG} for source in SOURCES]  # the files of an entry, its manifest aside


def lookup(spec: KernelSpec) -> Artifact | None:
    """The published kernel, if it is there and intact. Never compiles."""
    return find(make_job(spec))


def build(spec: KernelSpec, *, timeout: float | None = None) -> Artifact:
    """The published kernel, compiled now if need be."""
    return make(make_job(spec), timeout=timeout)


def expected_seconds(family: Family, target: Target) -> float:
    """What a build will take, judged by the latest ones of this family on this machine."""
    known = []
    for folder in sorted((env.cache_dir() / "kernels").glob(f"{family.name}-{target.arch}-*"))[-8:]:
        with suppress(OSError, ValueError, KeyError):
            known.append(float(json.loads((folder / MANIFEST).read_text())["facts"]["compile_seconds"]))
    return sorted(known)[len(known) // 2] if known else (4.0 if target.is_gpu else 2.0)


# ---- the cache ----------------------------------------------------------------------------------------------------


def find(job: Job) -> Artifact | None:
    key = job.key()
    return read_entry(job.folder(key), key)


def read_entry(folder: Path, key: str | None = None) -> Artifact | None:
    """The entry of a folder, or None if anything about it is missing, damaged or of another key.

    CacheError: another user could have written it.
    """
    try:
        cachedir.guard_entry(folder)
        return _read(folder, key)
    except OSError:
        return None


def _read(folder: Path, key: str | None) -> Artifact | None:
    """The files of a manifest are exactly those of an entry, so that no name in it leads anywhere else."""
    try:
        cachedir.guard(folder / MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        if (key is not None and manifest["key"] != key) or files.keys() not in _LISTINGS:
            return None
        for name, facts in files.items():
            path = folder / name
            if cachedir.guard(path).st_size != facts["bytes"]:
                return None
            if hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
                return None
        about = manifest["about"]
        return Artifact(
            folder / LIBRARY, manifest["key"], about.get("source_hash", ""), about["arch"], manifest["facts"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def make(job: Job, *, timeout: float | None = None, tell: Callable[[], None] = lambda: None) -> Artifact:
    """Hit, or compile and publish; `tell` is called before something is compiled."""
    key = job.key()
    folder = job.folder(key)
    found = read_entry(folder, key)
    if found:
        return found
    if env.build_mode() == "never":
        forbids, allow = env.forbidden()
        raise BuildError(
            f"{job.name} is not built, and {forbids} forbids to compile",
            f"looked in {folder}",
            f"build it ahead: {allow} {_command(job)}",
        )
    timeout = DEFAULT_TIMEOUT if timeout is None else timeout
    scratch = _scratch()
    tell()
    if scratch is None:
        return _make_uncached(job, key, timeout)
    try:
        with _locked(key, timeout):
            found = read_entry(folder, key)  # another process may have built it while this one waited
            return found or _publish(_compile(job, key, scratch.path / "build", timeout), folder, key)
    except OSError as error:
        raise _storage_error(job, error) from error
    finally:
        scratch.remove()


def _command(job: Job) -> str:
    """The `fagen build` that makes it. The binding, which has no problem, is made beside any kernel."""
    problem = job.about.get("problem")
    small = {"op": "forward", "dtype": "fp32", "head_dim": 64}
    return ops.build_command(ops.problem_from(problem or small), job.arch)


def _scratch() -> cachedir.Scratch | None:
    """A fresh folder on the cache's file system, or None if the cache cannot be written."""
    try:
        root = cachedir.folder("tmp")
        cachedir.sweep(root)
        cachedir.sweep(Path(tempfile.gettempdir()))
        return cachedir.Scratch(root)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CacheError(
                "no space left for building kernels",
                str(env.cache_dir()),
                "free some: fagen cache clear, or set FAGEN_CACHE_DIR",
            ) from error
        return None


def _make_uncached(job: Job, key: str, timeout: float) -> Artifact:
    """The cache is read-only: build for this process alone."""
    import atexit

    warnings.warn(
        f"fagen: {env.cache_dir()} cannot be written; {job.name} is built for this process only "
        "(set FAGEN_CACHE_DIR to a folder that can)",
        stacklevel=2,
    )
    try:
        scratch = cachedir.Scratch(Path(tempfile.gettempdir()))
        atexit.register(scratch.remove)
        artifact = _read(_compile(job, key, scratch.path / "build", timeout), key)
    except OSError as error:
        raise _storage_error(job, error) from error
    assert artifact is not None
    return artifact


@contextmanager
def _locked(key: str, timeout: float) -> Iterator[None]:
    """One builder a key, as far as that can be had; a lock that fails or times out means: compile anyway."""
    lock = None
    try:
        lock = filelock.FileLock(cachedir.folder("locks") / f"{key[:16]}.lock", mode=0o600)
        lock.acquire(timeout=timeout)
    except (OSError, NotImplementedError, filelock.Timeout):
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _publish(private: Path, folder: Path, key: str) -> Artifact:
    """One rename. If somebody else was first, theirs is used; if a damaged entry is in the way, it is replaced."""
    cachedir.folder("kernels")
    for _ in range(3):
        try:
            os.rename(private, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            theirs = read_entry(folder, key)
            if theirs:
                return theirs
            _move_away(folder, private.parent)
            continue
        _sync(folder.parent)
        ours = read_entry(folder, key)
        if ours:
            return ours
        break
    raise BuildError(f"{folder.name} was built but cannot be kept", f"{folder}", "run: fagen cache verify")


def _move_away(path: Path, scratch: Path) -> None:
    """Into the scratch folder, which is removed with all that is in it."""
    with suppress(FileNotFoundError):  # another process moved it
        os.rename(path, scratch / f"damaged-{uuid.uuid4().hex[:12]}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- one compilation ----------------------------------------------------------------------------------------------


def _compile(job: Job, key: str, folder: Path, timeout: float) -> Path:
    """Fill a private folder: source, build log, library, and the manifest last."""
    os.mkdir(folder, 0o700)
    source = folder / f"kernel{job.suffix}"
    cachedir.write(source, job.source.encode())
    cachedir.write(folder / LOG, b"")
    start = time.perf_counter()
    status = run_build(job, source, folder / LOG, timeout)
    seconds = time.perf_counter() - start
    log = (folder / LOG).read_text(errors="replace")
    library = folder / LIBRARY
    if status != 0 or not library.exists():
        raise _failure(job, key, folder, log, status, timeout)
    for extra in folder.iterdir():  # objects and ninja's own files say nothing to a reader
        if extra.name not in (source.name, LOG, LIBRARY):
            extra.unlink() if extra.is_file() else shutil.rmtree(extra, ignore_errors=True)
    facts = {"compile_seconds": round(seconds, 3), **parse_ptxas(log)}
    files = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _sync(path)
    about = job.about | {"arch": job.arch, "flags": job.flags, "link_flags": job.link_flags}
    manifest = {"schema": KEY_SCHEMA, "key": key, "files": files, "facts": facts, "about": about}
    cachedir.write(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    _sync(folder)
    return folder


_KILLED = re.compile(r"[Kk]illed|died due to signal|signal terminated|code=137|Terminated")


def _failure(job: Job, key: str, folder: Path, log: str, status: int | None, timeout: float) -> FagenError:
    """The error of a failed build; its source and log are kept where the message says."""
    try:
        kept = cachedir.folder("failed") / f"{job.name}-{key[:16]}"
        cachedir.make(kept)
        for name in (f"kernel{job.suffix}", LOG):
            cachedir.write(kept / name, (folder / name).read_bytes())
        where = f"source and log: {kept}"
    except (OSError, CacheError):
        where = "source and log could not be kept"
    tail = "\n".join(log.splitlines()[-40:])
    what = f"cannot compile {job.name}"
    if status is None:
        return BuildError(f"{what}: it ran past its limit of {timeout:g} s", where, log=tail, killed=True)
    if "No space left on device" in log:
        return CacheError(f"{what}: no space left", where, "free some: fagen cache clear; FAGEN_CACHE_DIR", log=tail)
    if status < 0 or _KILLED.search(log):
        remedy = "was memory short? fewer compilers at a time may help"
        return BuildError(f"{what}: the compiler was killed", where, remedy, log=tail, killed=True)
    errors = [line.strip() for line in log.splitlines() if re.search(r"\berror\b", line)]
    return BuildError(what, errors[0][:300] if errors else f"exit code {status}", where, log=tail)


def _storage_error(job: Job, error: OSError) -> CacheError:
    return CacheError(
        f"cannot keep {job.name}: {error.strerror or error}",
        f"cache: {env.cache_dir()}",
        "free some space (fagen cache clear), or set FAGEN_CACHE_DIR to a folder that can be written",
    )
