"""Builds that nobody waits for: one after the other, in a thread of this process whose compilers are child processes.

A process that ends, ends them too: nothing is half-way, since a build is published whole or not at all. A forked copy
of the process has no thread; it begins with nothing pending.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import queue
import threading
import warnings
from collections.abc import Callable, Hashable

_JOIN_SECONDS = 10.0  # at the end of the process, for a build that was ended to clear away its folder

_Work = Callable[[], None]

_queue: queue.PriorityQueue[tuple[int, int, Hashable, _Work]] = queue.PriorityQueue()
_order = itertools.count()
_pending: set[Hashable] = set()
_told: list[str] = []
_thread: threading.Thread | None = None
_lock = threading.Lock()
_ending = False


def submit(key: Hashable, work: _Work, *, last: bool = False) -> bool:
    """Do it soon, `last` after all others; False if it is pending already. `work` tells its own failures."""
    global _thread
    with _lock:
        if key in _pending or _ending:
            return False
        _pending.add(key)
        _queue.put((int(last), next(_order), key, work))
        if _thread is None:
            atexit.register(_end)
            _thread = threading.Thread(target=_run, name="fagen-background", daemon=True)
            _thread.start()
    return True


def pending(key: Hashable) -> bool:
    return key in _pending


def tell(text: str) -> None:
    """Say at the next call, in the caller's thread, what went wrong."""
    if not _ending:
        _told.append(text)


def warn_told() -> None:
    while _told:
        warnings.warn(f"fagen: {_told.pop(0)}", stacklevel=3)


def wait(timeout: float = 600.0) -> None:
    """Until nothing is pending; for tests and for whoever measures."""
    done = threading.Event()
    if _pending and submit(("waiting", next(_order)), done.set, last=True):
        done.wait(timeout)


def _run() -> None:
    while not _ending:
        _, _, key, work = _queue.get()
        try:
            if not _ending:
                work()
        except BaseException as error:  # the thread outlives what goes wrong
            tell(f"a build beside the calls failed: {type(error).__name__}: {error}")
        finally:
            _pending.discard(key)


def _end() -> None:
    """The compilers are killed by `compile`, whose own handler ran before; what waits for one clears its folder."""
    global _ending
    _ending = True
    _queue.put((-1, next(_order), "end", lambda: None))
    if _thread is not None:
        _thread.join(_JOIN_SECONDS)


def _after_fork() -> None:
    global _thread, _lock, _queue
    _lock, _thread, _queue = threading.Lock(), None, queue.PriorityQueue()
    _pending.clear()
    with contextlib.suppress(ValueError):
        atexit.unregister(_end)


os.register_at_fork(after_in_child=_after_fork)
