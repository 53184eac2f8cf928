"""`fagen db portfolio`: few kernels that serve many sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fagen.errors import UsageError
from fagen.notices import emit_json, say


def add(verb: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    text = "the fewest configs that keep every recorded size near its winner, by what was measured"
    parser = verb("portfolio", text, "portfolio d128/causal --times benchmarks/spaces/h200_d128_causal_gqa.jsonl.xz")
    parser.add_argument("key", nargs="?", default="", metavar="KEY", help="a static key or a part of it (default: all)")
    parser.add_argument(
        "--times", nargs="+", type=Path, default=[], metavar="PATH", help="recorded spaces, and folders of tuning runs"
    )
    parser.add_argument("--from", dest="source", type=Path, metavar="PATH", help="records (default: those in use)")
    parser.add_argument("--within", type=_percent, default=0.01, metavar="P%", help="of a winner's time (default: 1%%)")
    parser.add_argument("--apply", action="store_true", help="write records that use the chosen configs, to --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the database file that --apply writes")


def _percent(word: str) -> float:
    digits = word.strip().removesuffix("%")
    if not digits.replace(".", "", 1).isdigit() or float(digits) > 100:
        raise argparse.ArgumentTypeError(f"{word!r} is no share of a time, like 1% or 2.5%")
    return float(digits) / 100


def run(args: argparse.Namespace) -> int:
    from fagen.db import store
    from fagen.db.record import Record, slug
    from fagen.tuner import portfolio

    if args.apply != bool(args.out):
        raise UsageError("--apply and --out FILE go together", "nothing was written")
    records = store.read_file(args.source)[0] if args.source and args.source.is_file() else None
    if records is None:
        records = store.Database.load([args.source] if args.source else None).records
    sources = portfolio.read(args.times)
    by_place: dict[portfolio.Place, list[Record]] = {place: [] for place in sources}
    for record in records:
        by_place.setdefault((record.arch, slug(record.device), record.problem.static_key), []).append(record)
    rows, written = [], []
    for place in sorted(by_place):
        mine, times = by_place[place], sources.get(place, [])
        known = portfolio.ratios(mine, times)
        if args.key not in place[2] or not known:
            written += mine
            continue
        found = portfolio.choose(place, known, args.within)
        rows.append(found.to_dict())
        written += portfolio.apply(found, mine, times)
        if not args.json:
            _tell(found, known)
    if not rows:
        raise UsageError(
            f"no record and no time is of a static key with {args.key!r}", remedy="fagen db list shows all"
        )
    if args.apply:
        _write(args.out, written)
    if args.json:
        emit_json({"within": args.within, "portfolios": rows, "written": str(args.out) if args.apply else None})
    return 0


def _tell(found: Any, known: dict[str, dict[Any, float]]) -> None:
    arch, device, static_key = found.place
    names = {kernel: number for number, kernel in enumerate(found.chosen, 1)}
    before, after = len(set(found.winners.values())), len(found.chosen)
    least = "" if found.exact else ", perhaps fewer would do"
    say(f"{static_key} on {arch} ({device}): {after} kernels for {len(found.serves)} sizes, were {before}{least}")
    for kernel, number in names.items():
        say(f"  {number}  {kernel[0]}: {kernel[1]}")
    for size, (kernel, ratio) in sorted(found.serves.items()):
        say(f"     {size:<32}kernel {names[kernel]}  {ratio:.3f}  of {len(known[size])} configs measured there")


def _write(path: Path, records: list[Any]) -> None:
    """A database file is of one device."""
    from fagen.db import merge

    devices = {(r.arch, r.device) for r in records}
    if len(devices) != 1:
        told = ", ".join(sorted(device for _, device in devices))
        raise UsageError(f"{len(devices)} devices do not go into one file", told, "name one database file with --from")
    merge.write_new(path, records)
    say(f"{len(records)} records written to {path}")
