"""What a worker's answer means for the candidate that it was asked about."""

from __future__ import annotations

from typing import Any

from fagen.errors import CacheError, MissingTool
from fagen.tuner.messages import Result
from fagen.tuner.workers import Death


def result_of(reply: Any, measured: bool) -> Result:
    """Of an answer, an exception or a death. Raises what no candidate could help."""
    if isinstance(reply, Result):
        return reply
    if isinstance(reply, (MissingTool, CacheError)):
        raise reply
    if isinstance(reply, Death):
        if measured:
            return Result("timeout" if reply.timed_out else "crash", reply.reason, fatal=True)
        return Result("timeout" if reply.timed_out else "compile", reply.reason, killed=not reply.timed_out)
    return Result("crash" if measured else "compile", f"{type(reply).__name__}: {reply}", fatal=measured)


def line(text: str) -> str:
    """A reason in one line that is not too long."""
    return " ".join(text.split())[:200]
