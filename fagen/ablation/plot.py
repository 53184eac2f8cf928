"""The story as a picture: TFLOP/s from step to step, a panel a series, a line a length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fagen.ablation.report import length, of_series
from fagen.bench import plot as bench

_WIDTH, _HEIGHT = 5.2, 2.9  # of a panel


def draw(result: dict[str, Any], out: Path) -> None:
    with bench.figures() as pyplot:
        panels, names = of_series(result), [step["name"] for step in result["steps"]]
        across = min(2, len(panels))
        down = -(-len(panels) // across)
        figure, grid = pyplot.subplots(
            down, across, figsize=(_WIDTH * across, _HEIGHT * down + 1.2), layout="constrained", sharex=True,
            squeeze=False,
        )  # fmt: skip
        axes = list(grid.flat)
        lengths = sorted({problem["length"] for problem in result["problems"]})
        colors = pyplot.get_cmap("viridis")
        known: dict[str, Any] = {}
        for axis, (title, problems) in zip(axes, panels.items(), strict=False):
            for problem in problems:
                shade = lengths.index(problem["length"]) / max(1, len(lengths) - 1)
                points = [_speed(problem["steps"].get(name, {})) for name in names]
                label = length(problem["length"])
                (known[label],) = axis.plot(
                    range(len(names)),
                    points,
                    marker="o",
                    markersize=3.5,
                    linewidth=1.4,
                    color=colors(0.9 - 0.9 * shade),
                )
            axis.set_title(title, fontsize=9, loc="left")
            axis.set_ylim(bottom=0)
            axis.set_xticks(range(len(names)), names, rotation=55, ha="right")
            bench.plain(axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for row in grid:
            row[0].set_ylabel("TFLOP/s", fontsize=8)
        figure.suptitle(f"{result['title']}: {result['device']}", fontsize=10, x=0.01, ha="left")
        ordered = {length(n): known[length(n)] for n in lengths if length(n) in known}
        figure.legend(
            ordered.values(), ordered.keys(), loc="outside lower right", ncols=max(1, len(ordered)), fontsize=8,
            frameon=False, title="length", title_fontsize=8,
        )  # fmt: skip
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _speed(facts: dict[str, Any]) -> float:
    value = facts.get("tflops")
    return float("nan") if value is None else value
