"""Runs one build in a child process that may be killed, and reads what the compiler said.

The child is kept for the next build: it has torch imported.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.build import cachedir, toolchain
from fagen.build.child import kill_session
from fagen.errors import BuildError

if TYPE_CHECKING:
    from fagen.build.job import Job

_START_SECONDS = 300.0  # importing torch on a busy machine; never the reason to wait for ever

_idle: list[_Builder] = []
_lock = threading.Lock()


def _after_fork() -> None:
    """In the child: a thread of the parent may have held the lock, and the parent's builders answer it alone."""
    global _lock
    _lock = threading.Lock()
    while _idle:
        _idle.pop().disown()


os.register_at_fork(after_in_child=_after_fork)


def run_build(job: Job, source: Path, log: Path, timeout: float) -> int | None:
    """The exit code of the build (negative: the signal that ended it), None if it ran past the time limit."""
    with _lock:
        builder = _idle.pop() if _idle else None
    if builder is None or not builder.usable():
        builder = _Builder()
    try:
        with cachedir.scratch() as temporary:  # a compiler that is killed leaves its files behind
            request = _request(job, source, log)
            request["environment"]["TMPDIR"] = str(temporary)
            status = builder.run(request, timeout)
    except BaseException:  # KeyboardInterrupt among them: leave no compiler running
        builder.close()
        raise
    with _lock:
        _idle.append(builder)
    return status


def _request(job: Job, source: Path, log: Path) -> dict[str, Any]:
    cxx = toolchain.require_cxx()
    environment = {"CXX": str(cxx)}
    flags, home = list(job.flags), ""
    if job.is_cuda:
        nvcc = toolchain.require_nvcc()
        home = str(toolchain.cuda_home(nvcc))
        environment |= {"PYTORCH_NVCC": str(nvcc), "CUDA_HOME": home}
        # cpp_extension forbids half arithmetic by macros; the emitted source is compiled without them
        switched_off = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
        flags += [f"-U__CUDA_NO_{name}__" for name in switched_off] + ["-ccbin", str(cxx)]
    return {
        "name": "kernel",
        "source": source.name,
        "folder": str(source.parent),
        "log": str(log),
        "flags": flags,
        "link_flags": list(job.link_flags),
        "environment": environment,
        "cuda_home": home,
        "links_torch": job.links_torch,
    }


class _Builder:
    """A running `child.py`. Serves one build at a time."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("child.py")
        run = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        environment = os.environ | {
            # the same packages as here; and ninja, which lives beside the interpreter in a virtual environment
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
        }
        self._pid = os.getpid()
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", run, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a Ctrl-C goes to this process, which then ends the build itself
        )
        atexit.register(self.close)

    def usable(self) -> bool:
        return self._pid == os.getpid() and self._process.poll() is None

    def run(self, request: dict[str, Any], timeout: float) -> int | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            started = self._reply(_START_SECONDS)
            if started is None:
                raise BuildError("the build process did not start", f"within {_START_SECONDS:g} s")
            self._job = int(started.split()[1])
            done = self._reply(timeout)
            if done is None:
                self._kill_job()
                self._reply(_START_SECONDS)
                return None
            self._job = 0
            return int(done.split()[1])
        except (BrokenPipeError, EOFError) as error:
            remedy = f"does this work? {sys.executable} -c 'import torch.utils.cpp_extension'"
            raise BuildError("the build process died", f"exit code {self._process.poll()}", remedy) from error

    _job = 0

    def _kill_job(self) -> None:
        if self._job:
            kill_session(self._job)
            self._job = 0

    def _reply(self, timeout: float) -> str | None:
        """The next line, or None when the time is up."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._process.stdout], [], [], left)[0]
            if not ready:
                return None
            data = os.read(self._process.stdout.fileno(), 4096)
            if not data:
                raise EOFError
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        """End the child and whatever it runs. A forked copy of this process leaves its parent's child alone."""
        atexit.unregister(self.close)
        if self._pid != os.getpid():
            return
        self._kill_job()
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def disown(self) -> None:
        """In a forked copy: the child ends when its maker's pipe closes, which an open copy would prevent."""
        atexit.unregister(self.close)
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


_PTXAS = re.compile(
    r"Compiling entry function '(?P<function>[^']+)'"
    r"|(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
)


def parse_ptxas(log: str, main: str = "forward_kernel") -> dict[str, Any]:
    """`functions`: of each kernel in the log its registers, spill_bytes (stored and loaded), stack, static smem_bytes.

    The same names beside it are those of the `main` one, or of the one with the most registers, of several such the one
    that spills most. `serialized` is there where ptxas had to make products of a warpgroup wait for each other.
    """
    functions: dict[str, dict[str, int]] = {}
    name = ""
    for match in _PTXAS.finditer(log):
        name = plain_name(match["function"]) if match["function"] else name
        found = functions.setdefault(name, {})
        if match["stack"] is not None:
            found["stack"] = int(match["stack"])
            found["spill_bytes"] = int(match["stores"]) + int(match["loads"])
        elif match["registers"] is not None:
            smem = re.search(r"(\d+) bytes smem", match["rest"])
            found |= {"registers": int(match["registers"]), "smem_bytes": int(smem[1]) if smem else 0}
    if not functions:
        return {}
    largest = max(functions.values(), key=lambda found: (found.get("registers", 0), found.get("spill_bytes", 0)))
    facts: dict[str, Any] = {**functions.get(main, largest), "functions": functions}
    if "instructions are serialized" in log:
        facts["serialized"] = 1
    return facts


def plain_name(symbol: str) -> str:
    """A function's own name out of its mangled one: the last of its names, each led by its length."""
    rest, name = symbol.removeprefix("_Z").removeprefix("N") if symbol.startswith("_Z") else "", ""
    while (digits := re.match(r"\d+", rest)) is not None:
        end = digits.end() + int(digits[0])
        name, rest = rest[digits.end() : end], rest[end:]
        if not symbol.startswith("_ZN"):
            break
    return name or symbol
