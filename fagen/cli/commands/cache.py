"""`fagen cache info|clear|verify`: the folder of built kernels."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.cli.arguments import add_verb
from fagen.notices import emit_json, say

if TYPE_CHECKING:
    from fagen.build.housekeeping import CacheEntry

_ACTIONS = {
    "info": "where the cache is, how many kernels it holds, how large it is",
    "clear": "remove all built kernels and what failed builds left, and nothing else; they are built again when needed",
    "verify": "check every kernel against its manifest; exit code 1 if one is damaged or refused",
}
_EXAMPLES = """examples:
  fagen cache info
  fagen cache verify --remove
  FAGEN_CACHE_DIR=/scratch/fagen fagen cache info --json"""


def add(subparsers: Any) -> None:
    listing = "\n".join(f"  {name:<8}{text}" for name, text in _ACTIONS.items())
    parser = add_verb(subparsers, "cache", f"Look after the folder of built kernels.\n\n{listing}", _EXAMPLES)
    parser.add_argument("action", choices=list(_ACTIONS), metavar="info|clear|verify")
    parser.add_argument("--remove", action="store_true", help="with verify: remove what is damaged")


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def run(args: argparse.Namespace) -> int:
    code, report = {"info": _info, "clear": _clear, "verify": _verify}[args.action](args)
    if args.json:
        emit_json(report)
    return code


def _state(entry: CacheEntry) -> str:
    return f"  REFUSED: {entry.refused.what}" if entry.refused else "" if entry.intact else "  DAMAGED"


def _say_left(left: list[Path]) -> None:
    if left:
        say(f"left alone, not made by fagen for this user: {left[0]}" + f", and {len(left) - 1} more" * (len(left) > 1))


def _info(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from fagen import env
    from fagen.build import housekeeping

    held, failed = housekeeping.entries(), housekeeping.failed()
    total = sum(entry.bytes for entry in held)
    say(f"{env.cache_dir()}: {len(held)} kernels, {megabytes(total)}, {len(failed)} failed builds kept for reading")
    for entry in held:
        say(f"  {megabytes(entry.bytes):>9}  {entry.path.name}{_state(entry)}")
    _say_left(housekeeping.foreign())
    rows = [
        {"name": e.path.name, "bytes": e.bytes, "intact": e.intact, "refused": str(e.refused) if e.refused else None}
        for e in held
    ]
    return 0, {"folder": str(env.cache_dir()), "bytes": total, "kernels": rows, "failed": [p.name for p in failed]}


def _clear(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from fagen import env
    from fagen.build import housekeeping

    count, freed, left = housekeeping.clear()
    say(f"{env.cache_dir()}: removed {count} entries, {megabytes(freed)}")
    _say_left(left)
    folder = str(env.cache_dir())
    return 0, {"folder": folder, "removed": count, "bytes": freed, "left": [str(path) for path in left]}


def _verify(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from fagen import env
    from fagen.build import housekeeping

    held = housekeeping.entries()
    damaged = [entry for entry in held if not entry.intact]
    say(f"{env.cache_dir()}: {len(held)} kernels, {len(damaged)} damaged or refused")
    for entry in damaged:
        say(f"  {entry.path.name}{_state(entry)}")
    left = damaged
    if args.remove:
        count, _, paths = housekeeping.remove([entry.path for entry in damaged])
        left = [entry for entry in damaged if entry.path in paths]
        say(f"removed {count}")
        _say_left(paths)
    elif damaged:
        say("a damaged kernel is never used; it is built again when needed. Remove it now: fagen cache verify --remove")
    names = [entry.path.name for entry in damaged]
    return 1 if left else 0, {"folder": str(env.cache_dir()), "kernels": len(held), "damaged": names}
