"""Whether a tuned winner may be used although its kernel's source has changed since.

A record keeps the hash of the source that was verified and timed. When today's templates make another source of the
same config, that source was never seen to be right on this device. Before it serves a first call it is verified as
the tuner does it, on small shapes and at the call's own size; the verdict is kept in the cache, by source and device,
so that it costs a machine a second once. A kernel that is wrong, or that took its process along, is not tried again.
Nothing is verified where nothing may be compiled, or while a CUDA graph is being captured.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen import env, ops
from fagen.build import cachedir
from fagen.codegen.spec import KernelSpec
from fagen.dispatch import kernels
from fagen.errors import BuildError, CacheError, FagenError, LaunchError, UsageError
from fagen.verify import checks

if TYPE_CHECKING:
    from fagen.db.record import Record
    from fagen.ops.base import Problem
    from fagen.target import Target


MODES = ("verify", "trust", "refuse")  # of FAGEN_STALE
KNOWN = "known"  # in its place: use what was verified before, and verify nothing now
_LOCK_SECONDS = 60.0
_verdicts: dict[Path, Verification] = {}  # of this process
_one_at_a_time = threading.Lock()


def _after_fork() -> None:
    """In the child: a thread of the parent may have held the lock."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Verification:
    """What a verification found."""

    ok: bool
    reason: str
    error: float = 0.0
    date: str = ""


@dataclass(frozen=True)
class Freshness:
    """`state` is current, verified, trusted, unverified, wrong or refused; the last two are not used."""

    state: str
    text: str

    @property
    def usable(self) -> bool:
        return self.state not in ("wrong", "refused")


def mode() -> str:
    word = env.get("FAGEN_STALE") or MODES[0]
    if word not in MODES:
        raise UsageError(f"FAGEN_STALE={word} is unknown", f"known: {', '.join(MODES)}")
    return word


def check(record: Record, spec: KernelSpec, *, check: bool, stale: str = "") -> Freshness:
    """What a legal config of a record is worth for the problem. `check` verifies now what was not verified before.

    `stale` stands for FAGEN_STALE where the caller decides.
    """
    today, target = spec.hash, spec.target
    if today == record.source_hash:
        return Freshness("current", "the source is the one that was tuned")
    changed = f"the source has changed since it was tuned ({record.source_hash}, now {today})"
    word = stale or mode()
    if word == "trust":
        return Freshness("trusted", f"{changed}; trusted, not verified (FAGEN_STALE=trust)")
    if word == "refuse":
        return Freshness("refused", f"{changed}; " + ("not tried" if stale else "FAGEN_STALE=refuse"))
    path = env.cache_dir() / "verified" / f"{today}-{_slug(target)}.json"
    found = _verdicts.get(path) or _read(path)
    if found is None and (word == KNOWN or env.build_mode() == "never"):
        forbids, allow = env.forbidden()
        remedy = f"this verifies it ahead: {allow} {ops.build_command(spec.problem, target.arch)}"
        return Freshness("refused", f"{changed} and was not verified; {forbids} forbids to do it now; {remedy}")
    if found is None and (not check or not kernels.device_is_ready(target)):
        return Freshness("unverified", f"{changed}; its first use verifies it")
    if found is None:
        with _one_at_a_time:
            found = _verdicts.get(path) or _verify(path, record, spec)
    if found.ok:
        return Freshness("verified", f"{changed}; verified here {found.date}, largest error {found.error:.2g}")
    return Freshness("wrong", f"{changed}; {found.reason}" + (f" (found here {found.date})" if found.date else ""))


def _slug(target: Target) -> str:
    from fagen.db.record import slug

    return f"{target.arch}-{slug(target.device)}"


# ---- verifying, and remembering -------------------------------------------------------------------------------------


def _verify(path: Path, record: Record, spec: KernelSpec) -> Verification:
    """Build, run and compare; the verdict is kept, unless it may be another tomorrow."""
    from fagen.db.record import now
    from fagen.notices import notify

    start = time.perf_counter()
    try:
        kernel = kernels.built(spec)
    except BuildError as error:
        lasts = bool(error.log) and not error.killed
        return _keep(path, Verification(False, f"today's source cannot be built: {error.what}", date=now()), lasts)
    except FagenError as error:
        return _keep(path, Verification(False, f"it cannot be built here: {error.what}"), False)
    with _alone(path) as held:
        found = _read(path)  # another process may have been quicker
        if found is None and not held:
            return _keep(
                path, Verification(False, f"another process has not ended verifying it in {_LOCK_SECONDS:.0f} s"), False
            )
        if found is None and _begun(path).exists():
            reason = "an earlier process ended while it verified this kernel"
            return _keep(path, Verification(False, reason, date=now()), True)
        if found is None:
            found = _run(path, kernel, spec.problem, spec.target)
            took = f"{time.perf_counter() - start:.1f} s, once"
            outcome = f"right, largest error {found.error:.2g}" if found.ok else f"NOT used: {found.reason}"
            notify(f"verified {spec.family.name} {record.key}, whose source changed since tuning: {outcome} ({took})")
    _verdicts[path] = found
    return found


def _run(path: Path, kernel: Any, problem: Problem, target: Target) -> Verification:
    """The verdict of running it. An error of the device leaves the process without it: that is raised."""
    import torch

    from fagen.db.record import now

    if target.is_gpu:
        torch.cuda.synchronize()  # what failed before is no fault of this kernel
    _write(_begun(path), {"pid": os.getpid(), "date": now()})
    broken: Exception | None = None
    try:
        error, message = checks.compare(kernel, problem, target)
        found, lasts = Verification(not message, message or "right", error, now()), True
    except LaunchError as error:
        found, lasts = Verification(False, f"it cannot run: {error.what}", date=now()), True
    except Exception as error:
        broken = error if target.is_gpu and _of_device(error) else None
        text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        found, lasts = Verification(False, f"it could not be verified: {text}", date=now()), broken is not None
    finally:
        with contextlib.suppress(OSError):
            _begun(path).unlink(missing_ok=True)
    _keep(path, found, lasts)
    if broken is not None:
        raise LaunchError(
            "a kernel whose source changed since it was tuned broke the device's context while it was verified",
            next(iter(str(broken).splitlines()), ""),
            "start this process again: the kernel is remembered and no longer used",
        ) from broken
    return found


def _of_device(error: Exception) -> bool:
    """Whether the device reported it, as after an illegal access; running out of memory is no such thing."""
    import torch

    kinds: Any = getattr(torch, "AcceleratorError", ())  # older ones of torch have none
    return not isinstance(error, torch.OutOfMemoryError) and (isinstance(error, kinds) or "CUDA error" in str(error))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """One verifying process a kernel; False: another one has not ended in time. No lock to be had is no obstacle."""
    import filelock

    lock = None
    try:
        cachedir.folder(path.parent.name)
        lock = filelock.FileLock(path.with_suffix(".lock"), mode=0o600)
        lock.acquire(timeout=_LOCK_SECONDS)
    except filelock.Timeout:
        yield False
        return
    except (OSError, NotImplementedError, CacheError):
        lock = None
    try:
        yield True
    finally:
        if lock is not None:
            lock.release()


def _begun(path: Path) -> Path:
    """There while a process verifies the kernel; left behind by one that did not survive it."""
    return path.with_suffix(".begun")


def _read(path: Path) -> Verification | None:
    """A verdict that another user could have written is none."""
    try:
        cachedir.guard_root()
        cachedir.guard(path.parent, folder=True)
        cachedir.guard(path)
        fields = json.loads(path.read_bytes())
        return Verification(bool(fields["ok"]), str(fields["reason"]), float(fields["error"]), str(fields["date"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, CacheError):
        return None


def _keep(path: Path, found: Verification, lasts: bool) -> Verification:
    """For this process, and where it lasts for those to come."""
    _verdicts[path] = found
    if lasts:
        _write(path, asdict(found))
    return found


def _write(path: Path, fields: dict[str, Any]) -> None:
    """Whole or not at all; a cache that cannot be written only costs the next process a second."""
    with contextlib.suppress(OSError, CacheError):
        cachedir.write(cachedir.folder(path.parent.name) / path.name, json.dumps(fields).encode())
