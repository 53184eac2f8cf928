"""`fagen cache info|clear|verify`: the folder of built kernels."""

from __future__ import annotations

import argparse
from typing import Any

from fagen.cliutil import add_verb, emit_json, say

_ACTIONS = {
    "info": "where the cache is, how many kernels it holds, how large it is",
    "clear": "remove all built kernels and what failed builds left; they are built again when needed",
    "verify": "check every kernel against its manifest; exit code 1 if one is damaged",
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


def _info(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from fagen import cachectl, env

    held, failed = cachectl.entries(), cachectl.failed()
    total = sum(entry.bytes for entry in held)
    say(f"{env.cache_dir()}: {len(held)} kernels, {megabytes(total)}, {len(failed)} failed builds kept for reading")
    for entry in held:
        say(f"  {megabytes(entry.bytes):>9}  {entry.path.name}{'' if entry.intact else '  DAMAGED'}")
    rows = [{"name": e.path.name, "bytes": e.bytes, "intact": e.intact} for e in held]
    return 0, {"folder": str(env.cache_dir()), "bytes": total, "kernels": rows, "failed": [p.name for p in failed]}


def _clear(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from fagen import cachectl, env

    count, freed = cachectl.clear()
    say(f"{env.cache_dir()}: removed {count} entries, {megabytes(freed)}")
    return 0, {"folder": str(env.cache_dir()), "removed": count, "bytes": freed}


def _verify(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from fagen import cachectl, env

    held = cachectl.entries()
    damaged = [entry.path for entry in held if not entry.intact]
    say(f"{env.cache_dir()}: {len(held)} kernels, {len(damaged)} damaged")
    for path in damaged:
        say(f"  {path.name}{' removed' if args.remove else ''}")
    if args.remove:
        cachectl.remove(damaged)
    elif damaged:
        say("a damaged kernel is never used; it is built again when needed. Remove it now: fagen cache verify --remove")
    report = {"folder": str(env.cache_dir()), "kernels": len(held), "damaged": [path.name for path in damaged]}
    return 1 if damaged and not args.remove else 0, report
