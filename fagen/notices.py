"""Words to people on stderr, data to programs on stdout."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

from fagen import env

_warned: set[str] = set()  # reasons for which PyTorch computes


def notify(text: str) -> None:
    """One line to stderr when a call is about to take long."""
    if not env.flag("FAGEN_QUIET"):
        print(f"fagen: {text}", file=sys.stderr, flush=True)


def say(text: str = "") -> None:
    """A line for the person in front of the terminal."""
    print(text, file=sys.stderr, flush=True)


class FallbackWarning(UserWarning):
    """A call is served by PyTorch; the message says why."""


def warn_fallback(reason: str, stacklevel: int = 4) -> None:
    """Once a reason and process, and never while torch.compile traces."""
    import torch

    if torch.compiler.is_compiling() or reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(f"fagen: PyTorch computes instead: {reason}", FallbackWarning, stacklevel=stacklevel)


def milliseconds(seconds: float | None) -> str:
    """Three digits, in the unit that suits them; a dash when there is none."""
    if not seconds:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            value = seconds / size
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    return "-"


def clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "-"
    return f"{int(max(0, seconds)) // 60}:{int(max(0, seconds)) % 60:02d}"


# ---- data ----------------------------------------------------------------------------------------------------------


def emit_json(value: Any) -> None:
    """Data for the next program."""
    emit_text(json.dumps(value, indent=2, default=str) + "\n")


def emit_text(text: str) -> None:
    """The only writer to stdout."""
    print(text, end="", flush=True)
