"""The child process that runs torch's cpp_extension: imports torch once, then forks for each build it is asked for.

Builds run here because cpp_extension is steered by environment variables and module globals that belong to the
user's process, and because a build must be killable. One JSON request a line on stdin; the replies on stdout are
`started <pid>` and `done <exit code>`. Each build is a session of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from typing import Any


def main() -> None:
    replies = os.dup(1)  # what libraries print goes to stderr
    os.dup2(2, 1)
    from torch.utils import cpp_extension

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(replies)
            os._exit(_build(cpp_extension, request))
        os.write(replies, f"started {pid}\n".encode())
        with contextlib.suppress(OSError):  # a kernel before 5.3 has no pidfd: then the build is only waited for
            child = os.pidfd_open(pid)
            if child not in select.select([child, sys.stdin], [], [])[0]:
                kill_session(pid)  # nothing but the end of input can come now: whoever asked is gone
            os.close(child)
        _, status = os.waitpid(pid, 0)
        os.write(replies, f"done {os.waitstatus_to_exitcode(status)}\n".encode())


def kill_session(leader: int) -> None:
    """SIGKILL to every process of a session: ninja gives each compiler a process group of its own."""
    for _ in range(10):  # a process that forks meanwhile is met the next time round
        alive = [int(name) for name in os.listdir("/proc") if name.isdigit() and _session(int(name)) == leader]
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not alive:
            return


def _session(pid: int) -> int:
    """0 for a process that is gone, or only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            state, _, _, session = stat.read().rpartition(")")[2].split()[:4]
        return 0 if state == "Z" else int(session)
    except (OSError, ValueError):
        return 0


def _build(cpp_extension: Any, request: dict[str, Any]) -> int:
    os.setsid()
    os.umask(0o077)
    os.chdir(request["folder"])
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ.pop("CC", None)  # cpp_extension would hand it to nvcc as -ccbin; the flags name the host compiler
    os.environ.update(request["environment"])
    if request["cuda_home"]:
        cpp_extension.CUDA_HOME = request["cuda_home"]
    if not request["links_torch"]:
        # a kernel uses nothing of torch, so that it loads without it; and a torch for CPUs lacks what it would name
        cpp_extension._prepare_ldflags = lambda ldflags, *rest, **named: ldflags
    try:
        cpp_extension.load(
            name=request["name"],
            # ninja runs in the folder. Its name may hold what ninja and the shell have a meaning for; this has none.
            sources=[f"/proc/self/cwd/{request['source']}"],
            extra_cflags=request["flags"],
            extra_cuda_cflags=request["flags"],
            extra_ldflags=request["link_flags"],
            build_directory=request["folder"],
            with_cuda=bool(request["cuda_home"]),
            is_python_module=False,
            verbose=True,
        )
    except Exception as error:  # whatever went wrong goes to the log, and the exit code says so
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    main()
