"""fagen report: one page about a tuning run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fagen.cli import arguments
from fagen.errors import UsageError
from fagen.notices import emit_json, say

_EXAMPLES = """examples:
  fagen report                                     the latest run, as report.html in its folder
  fagen report RUN --out tuned.html
  fagen report benchmarks/h200_tune_trials.jsonl --out h200.html     a file of candidates alone
  fagen report RUN --json | python -m json.tool    what the page shows, as data
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    about = "Write one HTML page about a tuning run: what was tried, what mattered, who won. It needs no network."
    parser = arguments.add_verb(subparsers, "report", about, _EXAMPLES)
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="a run's folder or name, or a file of candidates (default: the latest run)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write (default: report.html in the run's folder)"
    )


def run(args: argparse.Namespace) -> int:
    from fagen.report import facts, load, page

    path = load.find(args.run)
    out = args.out or (path / "report.html" if path.is_dir() else path.with_suffix(".html"))
    found = facts.of_run(path)
    _write(out, page.render(found))
    s = found["summary"]
    say(f"{found['run']}: {s['tried']} candidates of {s['problems']} problems, {s['timed']} timed")
    say(f"written: {out}")
    if args.json:
        emit_json({"written": str(out), **found})
    return 0


def _write(out: Path, text: str) -> None:
    draft = out.with_name(out.name + ".part")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written", str(error), "name another file with --out") from error
