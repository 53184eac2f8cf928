"""Draws a tuning run: every candidate that was tried, in the order in which it was, and the best so far.

    python docs/tune_picture.py benchmarks/h200_tune_trials.jsonl docs/img/tuning.svg --only q1024
    python docs/tune_picture.py ~/.local/state/fagen/runs/RUN/trials.jsonl run.svg

A panel a problem. Configs that the sampler asked for and a constraint rejected cost nothing and are not drawn.
`--reduce FILE` writes what the picture needs of a run, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fagen.tuner.journal import read_lines

FIELDS = ("problem", "outcome", "seconds", "spread", "config")
FAILED = {"compile": "#8c564b", "spill": "#e08214", "wrong": "#c51b1b", "crash": "#7b3294", "timeout": "#444444"}
OK, BEST = "#7aa6d1", "#08306b"


def tried(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The candidates of each problem that were built at least, in order."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in read_lines(path):
        if row["outcome"] != "constraint":
            runs.setdefault(row["problem"], []).append(row)
    return runs


def panel(axis: Any, problem: str, rows: list[dict[str, Any]]) -> None:
    times = [row["seconds"] * 1e3 if row["outcome"] == "ok" else math.nan for row in rows]
    good = [(number, ms) for number, ms in enumerate(times, 1) if not math.isnan(ms)]
    axis.scatter(*zip(*good, strict=True), s=11, color=OK, linewidths=0, label="right, timed")
    best = list(accumulate((math.inf if math.isnan(ms) else ms for ms in times), min))
    axis.step(range(1, len(best) + 1), best, where="post", color=BEST, linewidth=1.5, label="best so far")
    for outcome, color in FAILED.items():
        numbers = [number for number, row in enumerate(rows, 1) if row["outcome"] == outcome]
        if numbers:
            top = axis.get_xaxis_transform()  # they have no time: a row of marks at the top
            axis.scatter(numbers, [0.96] * len(numbers), s=20, marker="|", color=color, transform=top, label=outcome)
    axis.set_yscale("log")
    low, high = min(ms for _, ms in good), max(ms for _, ms in good)
    axis.set_ylim(low * 0.9, high * (high / low) ** 0.15)
    ticks = [low * 2**i for i in range(1 + math.floor(math.log2(high / low)))]
    axis.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.minorticks_off()
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(problem.removeprefix("forward/"), fontsize=8.5, loc="left")
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", linewidth=0.4, color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)


def draw(runs: dict[str, list[dict[str, Any]]], out: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "fagen", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot

    columns = min(3, len(runs))
    lines = -(-len(runs) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.5 * columns, 2.2 * lines + 0.6), squeeze=False, layout="constrained"
    )
    for axis, (problem, rows) in zip(axes.flat, runs.items(), strict=False):
        panel(axis, problem, rows)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms a call", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("candidate", fontsize=8)
    known: dict[str, Any] = {}
    for axis in axes.flat:
        known |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.legend(known.values(), known.keys(), loc="outside lower right", ncols=len(known), fontsize=8, frameon=False)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=Path, help="trials.jsonl of a run, or a reduced one")
    parser.add_argument("out", type=Path, nargs="?", help="picture to write: .svg or .png")
    parser.add_argument("--only", default="", metavar="TEXT", help="the problems whose key contains this")
    parser.add_argument("--title", default="")
    parser.add_argument("--reduce", type=Path, metavar="FILE")
    options = parser.parse_args()
    runs = tried(options.trials)
    if options.reduce:
        rows = [{name: row[name] for name in FIELDS} for rows in runs.values() for row in rows]
        options.reduce.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    chosen = {problem: rows for problem, rows in runs.items() if options.only in problem}
    if options.out:
        draw(chosen, options.out, options.title or "fagen tune: candidates in the order in which they were tried")


if __name__ == "__main__":
    main()
