"""Processes that may die. A worker answers one request at a time; one that hangs, crashes or is killed is replaced.

Requests and replies are picklable facts, never tensors. Workers are spawned, hear no Ctrl-C, and die with the process
that started them.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fagen.errors import FagenError
from fagen.timing import load

START_SECONDS = 180.0  # to import torch; longer on a busy machine
MOST_START_FAILURES = 3
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Death:
    """Why there is no reply."""

    timed_out: bool
    reason: str


def _nothing() -> None: ...


def _serve(
    connection: Connection, handler: Callable[[Any], Any], prepare: Callable[[], None], log: str, parent: int, oom: int
) -> None:
    """The child's main loop: ready, then a reply for each request. An exception is a reply too."""
    os.setsid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we could ask to die with it
        os._exit(1)
    _be_modest(oom)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):  # whatever kernels and compilers say
        os.dup2(output, stream)
    prepare()
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            reply = handler(request)
        except Exception as error:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            reply = error
        try:
            connection.send(reply)
        except BrokenPipeError:
            return


def _be_modest(oom: int) -> None:
    """Short of memory, the system shall end this process and its compilers first; a crash leaves no core file."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(oom))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Worker:
    """One child process and its one request in flight. `job` is the caller's own note about it.

    `oom`: how much sooner than others it is ended when the machine runs out of memory, 0 to 1000.
    """

    def __init__(
        self, handler: Callable[[Any], Any], log: Path, prepare: Callable[[], None] = _nothing, oom: int = 0
    ) -> None:
        self.handler, self.log, self.prepare, self.oom = handler, log, prepare, oom
        self.job: Any = None
        self.since = 0.0  # when the caller gave it something to do
        self.busy = False
        self.slowdown = load.Slowdown()
        self._deadline = 0.0
        self._seconds = 0.0
        self._ready = False
        self._request: Any = None
        self._start_failures = 0
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Spawn the process, if there is none; its import of torch goes on meanwhile."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        args = (theirs, self.handler, self.prepare, str(self.log), os.getpid(), self.oom)
        self._process = context.Process(target=_serve, args=args, daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False
        self._deadline = time.monotonic() + START_SECONDS

    def send(self, request: Any, seconds: float, job: Any = None) -> None:
        """Start a request that may take `seconds`, not counting the start of the process."""
        if self._process is not None and not self._process.is_alive():  # it died while idle: nobody's fault
            self.kill()
        self.start()
        self.busy, self.job, self._seconds, self._request = True, job, seconds, request
        if self._ready:
            self._hand_over()

    def _hand_over(self) -> None:
        assert self._connection is not None
        self._deadline = time.monotonic() + self._seconds
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # poll finds the body
            self._connection.send(self._request)

    @property
    def waits_on(self) -> list[Any]:
        """What to hand to multiprocessing.connection.wait."""
        return [self._connection, self._process.sentinel] if self._process and self._connection else []

    def poll(self) -> Any | Death | None:
        """The reply, an exception raised by the handler, a Death, or None when there is nothing yet."""
        if not self.busy or self._connection is None or self._process is None:
            return None
        try:
            while self._connection.poll():
                reply = self._connection.recv()
                if self._ready:
                    self.busy = False
                    return reply
                self._ready, self._start_failures = True, 0
                self._hand_over()
        except (EOFError, OSError):
            return self._died()
        if not self._process.is_alive():
            return self._died()
        if time.monotonic() > self._deadline:
            if not self._ready:
                self._starts_late()
                return None
            self.kill()
            return Death(True, f"no answer within {self._seconds:.0f} s; the worker was killed")
        return None

    def _starts_late(self) -> None:
        """An error, unless the machine's load explains it."""
        limit = START_SECONDS * self.slowdown()
        if time.monotonic() > self._deadline - START_SECONDS + limit:
            self.kill()
            raise FagenError("a worker process did not start", f"within {limit:.0f} s", f"see {self.log}")

    def _died(self) -> Death | None:
        assert self._process is not None
        self._process.join(5)
        code, ready = self._process.exitcode, self._ready
        request, seconds, job = self._request, self._seconds, self.job
        self.kill()
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        if ready:
            return Death(False, f"the worker died: {how}")
        self._start_failures += 1
        if self._start_failures >= MOST_START_FAILURES:
            raise FagenError(
                "a worker process cannot start", f"it died {self._start_failures} times: {how}", f"see {self.log}"
            )
        self.send(request, seconds, job)
        return None

    def kill(self) -> None:
        """End the process and all that it started, at once."""
        process, connection = self._process, self._connection
        self.busy, self._process, self._connection = False, None, None
        if process is not None and process.pid is not None:
            for pid in [*reversed(_descendants(process.pid)), process.pid]:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            process.join(10)
        if connection is not None:
            connection.close()


def _descendants(pid: int) -> list[int]:
    """All processes below one (Linux; elsewhere none are found)."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found
