"""What values from outside may be. Records, databases and problems come from strangers and from damaged disks.

A check returns "" or what is wrong with the value, for the error of the door that it came through.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

MOST = 2**31 - 1  # of a size: the params of a kernel hold int32
_MOST_FACTS = 64  # knobs of a config, facts of an environment
_LEAST_SECONDS, _MOST_SECONDS = 1e-9, 1e9  # of a call
_SHOWN = 80  # characters of a value in a message

_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,63}")
_ARCH = re.compile(r"cpu|sm_[0-9]{2,3}[af]?")
_HASH = re.compile(r"[0-9a-f]{1,64}")
_CHOICE = re.compile(r"[A-Za-z0-9_.+-]{1,64}")  # of a knob, as a word
_FACT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DATE = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:[0-9]{2})?)?"
)


def shown(value: Any) -> str:
    """A value in a message: one line of printable characters, and short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep nest
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def printable(text: str, most: int = 200) -> str:
    """A name from the system as it may stand in a record: blanks for what cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:most]


# ---- kinds of values ------------------------------------------------------------------------------------------------


def integer(value: Any, least: int = 0, most: int = MOST) -> str:
    if type(value) is int and least <= value <= most:
        return ""
    return f"{shown(value)} is no integer from {least} to {most}"


def number(value: Any, least: float = 0.0, most: float = 1e300) -> str:
    """Finite, too: NaN compares false, and the bounds leave no infinity."""
    if type(value) in (int, float) and least <= value <= most:
        return ""
    return f"{shown(value)} is no number from {least:g} to {most:g}"


def seconds(value: Any) -> str:
    return number(value, _LEAST_SECONDS, _MOST_SECONDS)


def seconds_or_none(value: Any) -> str:
    """0 where nothing was measured."""
    return "" if type(value) in (int, float) and value == 0 else seconds(value)


def spread(value: Any) -> str:
    return number(value, 0.0, _MOST_SECONDS)


def _matches(value: Any, pattern: re.Pattern[str], what: str) -> str:
    return "" if type(value) is str and pattern.fullmatch(value) else f"{shown(value)} is no {what}"


def text(value: Any, most: int = 200) -> str:
    if type(value) is str and len(value) <= most and value.isprintable():
        return ""
    return f"{shown(value)} is no line of at most {most} printable characters"


def identifier(value: Any) -> str:
    return _matches(value, _IDENTIFIER, "identifier like sm90_forward")


def arch(value: Any) -> str:
    return _matches(value, _ARCH, "arch: cpu or like sm_90")


def source_hash(value: Any) -> str:
    return _matches(value, _HASH, "hexadecimal hash")


def date(value: Any) -> str:
    """ISO 8601, or empty."""
    if value == "" and type(value) is str:
        return ""
    wrong = _matches(value, _DATE, "date like 2026-01-31T12:00:00+00:00")
    if not wrong:
        try:
            datetime.datetime.fromisoformat(value)
        except ValueError:
            return f"{shown(value)} is no day or time that there is"
    return wrong


# ---- of a record ----------------------------------------------------------------------------------------------------


def config(value: Any) -> str:
    """Knobs by name: bool, int or a word. Whether a family has them is for the family to say."""
    if type(value) is not dict or len(value) > _MOST_FACTS:
        return f"{shown(value)} is no object of at most {_MOST_FACTS} knobs"
    for name, choice in value.items():
        wrong = identifier(name)
        if not wrong and type(choice) is not bool:
            wrong = _matches(choice, _CHOICE, "choice of a knob") if type(choice) is str else integer(choice, -MOST)
        if wrong:
            return wrong
    return ""


def environment(value: Any) -> str:
    if type(value) is not dict or len(value) > _MOST_FACTS:
        return f"{shown(value)} is no object of at most {_MOST_FACTS} facts"
    return next(filter(None, (_matches(k, _FACT, "name of a fact") or text(v, 500) for k, v in value.items())), "")
