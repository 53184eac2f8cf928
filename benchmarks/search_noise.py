"""How far the times of a search are from those of its final rounds, and how far the default is behind the winner.

    python benchmarks/search_noise.py NAME=RUN... --out FILE.json     RUN: a run's folder
    python benchmarks/search_noise.py --show FILE.json

Of each problem whose winner is not its default: the winner's time over the default's in the search, where they were
timed at different moments, and in the final round, where they were timed in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from fagen.report import load
from fagen.tuner import journal


def of_run(run: Path) -> dict[str, Any]:
    searched: dict[str, dict[str, float]] = {}
    candidates: dict[str, int] = {}
    for row in journal.read_lines(run / journal.TRIALS):
        candidates[row["problem"]] = candidates.get(row["problem"], 0) + 1
        if row["seconds"]:
            searched.setdefault(row["problem"], {})[_text(row["config"])] = row["seconds"]
    problems = []
    for row in journal.read_lines(run / journal.WINNERS):
        key = load.key_of(row["problem"])
        times = searched.get(key, {})
        problems.append(
            {
                "problem": key, "candidates": candidates.get(key, 0), "same": row["config"] == row["default_config"],
                "search": [times.get(_text(row["config"])), times.get(_text(row["default_config"]))],
                "final": [row["seconds"], row["default_seconds"]],
            }
        )  # fmt: skip
    return {"date": json.loads((run / journal.META).read_text())["date"], "problems": problems}


def _text(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def tell(name: str, run: dict[str, Any]) -> str:
    problems = run["problems"]
    apart = [
        math.log(p["search"][0] / p["search"][1] * p["final"][1] / p["final"][0])
        for p in problems
        if not p["same"] and all(p["search"]) and all(p["final"])
    ]
    behind = [p["final"][1] / p["final"][0] for p in problems if all(p["final"])]
    return (
        f"{name}: {len(problems)} problems, {statistics.fmean(p['candidates'] for p in problems):.0f} candidates each; "
        f"search against final round {statistics.pstdev(apart):.1%} over {len(apart)}, at most "
        f"{max(map(abs, apart)):.1%}; default behind winner {statistics.geometric_mean(behind) - 1:.1%}, at most "
        f"{max(behind) - 1:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    args = parser.parse_args()
    data = json.loads(args.show.read_text()) if args.show else {}
    for word in args.runs:
        name, _, run = word.partition("=")
        data[name] = of_run(Path(run))
    if args.out:
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    for name, run in data.items():
        print(tell(name, run))


if __name__ == "__main__":
    main()
