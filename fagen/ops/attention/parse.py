"""Sizes, head dims and windows as people write them on a command line or in a TOML file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fagen import schema
from fagen.errors import UsageError


def split(value: Any) -> list[str]:
    """'1k,4k', 4096 or ["1k", 4096] as words."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",")]
    if isinstance(value, Iterable):
        return [word for item in value for word in split(item)]
    return [str(value)]


def size(word: str) -> int:
    """4096, 4k or 1m; k is 1024."""
    found = re.fullmatch(r"0*([1-9][0-9]{0,9})([km]?)", word, re.IGNORECASE | re.ASCII)
    length = int(found[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[found[2].lower()] if found else 0
    if not 1 <= length <= schema.MOST:
        raise UsageError(
            f"{schema.shown(word)} is no size", f"sizes are like 4096, 4k or 1k,4k,16k, and at most {schema.MOST}"
        )
    return length


def sizes(value: Any) -> list[int]:
    return [size(word) for word in split(value)]


def head_dims(value: Any) -> list[tuple[int, int]]:
    """(of q and k, of v) for each of '64,192-128'."""
    pairs = []
    for word in split(value):
        qk, dash, v = word.partition("-")
        if not is_number(qk) or (dash and not is_number(v)):
            raise UsageError(f"{schema.shown(word)} is no head dim", "head dims are like 128, 64,128 or 192-128")
        pairs.append((int(qk), int(v or qk)))
    return pairs


def is_number(word: str) -> bool:
    """Of decimal digits, and of no more than any bound of a problem has."""
    return re.fullmatch(r"[0-9]{1,10}", word) is not None


def choices(name: str, value: Any, known: Iterable[str]) -> list[str]:
    words = split(value)
    for word in words:
        if word not in known:
            raise UsageError(f"{name} {schema.shown(word)} is unknown", f"known: {', '.join(known)}")
    return words


def window(value: Any) -> tuple[int, int]:
    """The bounds of '1024,0' or 'none,0'; -1 is unbounded."""
    words = split(value)
    bounds = [-1 if word in ("none", "-1", "") else int(word) if is_number(word) else None for word in words]
    if len(bounds) != 2 or None in bounds:
        raise UsageError(f"window {schema.shown(value)} cannot be read", "it is LEFT,RIGHT, like 1024,0 or none,0")
    return bounds[0], bounds[1]  # type: ignore[return-value]
