"""TFLOP/s by length, a panel for each series of rows; rows without lengths to compare share a panel of bars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fagen.bench.peers import OURS
from fagen.bench.report import participants
from fagen.errors import MissingTool

COLORS = {
    OURS: "#08306b", "cudnn": "#4d9221", "fa2": "#999999", "fa3": "#e08214", "fa4": "#c51b1b", "flex": "#7b3294",
    "flashinfer": "#8c564b", "sdpa": "#66a61e",
}  # fmt: skip
_COLUMNS = 4


def require() -> None:
    """Asked before a run, so that it is not lost at its end."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise MissingTool("--plot needs the package matplotlib", remedy="pip install matplotlib")


@contextlib.contextmanager
def figures() -> Iterator[Any]:
    """matplotlib.pyplot, without a display, for files that are the same each time; what it opened is closed."""
    require()
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context({"svg.hashsalt": "fagen", "svg.fonttype": "none", "font.family": "sans-serif"}):
        from matplotlib import pyplot

        try:
            yield pyplot
        finally:
            pyplot.close("all")


def draw(result: dict[str, Any], out: Path) -> None:
    with figures() as pyplot:
        _draw(result, out, pyplot)


def _draw(result: dict[str, Any], out: Path, pyplot: Any) -> None:
    names, panels, single = participants(result), *_panels(result)
    width = min(_COLUMNS, max(1, len(panels)))
    lines = -(-len(panels) // width)
    figure = pyplot.figure(
        figsize=(3.0 * max(width, 2), 2.2 * lines + (3.2 if single else 0) + 0.8), layout="constrained"
    )
    grid = figure.add_gridspec(lines + (1 if single else 0), width, height_ratios=[2.2] * lines + [3.2] * bool(single))
    axes = [figure.add_subplot(grid[i // width, i % width]) for i in range(len(panels))]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        _lines(axis, title, rows, names)
    if single:
        axes.append(figure.add_subplot(grid[lines, :]))
        _bars(axes[-1], single, names, result["limit"]["tflops"])
    for i, axis in enumerate(axes):
        plain(axis)
        if i % width == 0 or axis is axes[-1]:
            axis.set_ylabel("TFLOP/s", fontsize=8)
    known: dict[str, Any] = {}
    for axis in axes:
        known |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    known = {name: known[name] for name in names if name in known}
    figure.suptitle(
        f"{result.get('op', 'forward').capitalize()} attention on {result['device']}", fontsize=10, x=0.01, ha="left"
    )
    figure.legend(
        known.values(), known.keys(), loc="outside lower right", ncols=max(1, len(known)), fontsize=8, frameon=False
    )
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _panels(result: dict[str, Any]) -> tuple[dict[str, list[Any]], list[Any]]:
    """Series of several lengths, and the rows that have no such company."""
    series: dict[str, list[Any]] = {}
    for row in result["rows"]:
        series.setdefault(row["series"], []).append(row)
    lengths = {name: len({row["length"] for row in rows}) for name, rows in series.items()}
    many = {name: rows for name, rows in series.items() if lengths[name] > 1}
    return many, [row for row in result["rows"] if row["series"] not in many]


def _speed(row: Any, name: str) -> float:
    return row["participants"].get(name, {}).get("tflops", float("nan"))


def _style(name: str) -> dict[str, Any]:
    return {"color": COLORS.get(name, "#444444"), "linewidth": 2.0 if name == OURS else 1.1, "label": name}


def _lines(axis: Any, title: str, rows: list[Any], names: list[str]) -> None:
    rows = sorted(rows, key=lambda row: row["length"])
    lengths = [row["length"] for row in rows]
    for name in reversed(names):  # ours on top
        speeds = [_speed(row, name) for row in rows]
        if any(value == value for value in speeds):
            axis.plot(lengths, speeds, marker="o", markersize=3.5, **_style(name))
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=8.5, loc="left")


def _bars(axis: Any, rows: list[Any], names: list[str], limit: float) -> None:
    shown = [name for name in names if any(_speed(row, name) == _speed(row, name) for row in rows)]
    width = 0.8 / max(1, len(shown))
    for i, name in enumerate(shown):
        at = [number + (i - (len(shown) - 1) / 2) * width for number in range(len(rows))]
        axis.bar(at, [_speed(row, name) for row in rows], width, color=COLORS.get(name, "#444444"), label=name)
    axis.axhline(limit, color="#444444", linewidth=0.7, linestyle=":")
    axis.set_xticks(range(len(rows)), [row["series"] or row["name"] for row in rows], rotation=20, ha="right")
    axis.set_title("one length each; dotted: the matrix product's rate", fontsize=8.5, loc="left")


def plain(axis: Any) -> None:
    axis.tick_params(labelsize=7.5)
    axis.set_axisbelow(True)
    axis.grid(axis="y", linewidth=0.4, color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
