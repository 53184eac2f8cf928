"""TFLOP/s by length, a panel for each series of rows; rows without lengths to compare share a panel of bars.

Of decoding GB/s by row, a panel of bars for each kind of cache.
"""

from __future__ import annotations

import contextlib
import re
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
        figure = (_decoding if result.get("op") == "decode" else _by_length)(result, pyplot)
        _label(figure, result, participants(result))
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _by_length(result: dict[str, Any], pyplot: Any) -> Any:
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
        axes[-1].set_title("one length each; dotted: the matrix product's rate", fontsize=8.5, loc="left")
    for i, axis in enumerate(axes):
        plain(axis)
        if i % width == 0 or axis is axes[-1]:
            axis.set_ylabel("TFLOP/s", fontsize=8)
    return figure


def _decoding(result: dict[str, Any], pyplot: Any) -> Any:
    """The limit is the rate at which PyTorch reads, in the same run."""
    names, kinds = participants(result), _kinds(result["rows"])
    heights = [2.2] * len(kinds)
    figure = pyplot.figure(figsize=(10.0, sum(heights) + 0.8), layout="constrained")
    for axis, (kind, rows) in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds.items(), strict=True):
        _bars(axis, rows, names, result["limit"]["read_gbps"], "gbps")
        axis.set_title(f"{kind}; dotted: the rate of reading", fontsize=8.5, loc="left")
        axis.set_ylabel("GB/s", fontsize=8)
        plain(axis)
    return figure


def _kinds(rows: list[Any]) -> dict[str, list[Any]]:
    """By what tells one cache from another in the name of a row; those without company are together, the last."""
    kinds: dict[str, list[Any]] = {}
    for row in rows:
        found = re.fullmatch(r"decode (?:(\w+) )?(b\d+ .*)", row["name"])
        kind, steps = (found[1] or "contiguous", found[2]) if found else ("others", row["name"])
        kinds.setdefault(kind, []).append({**row, "series": steps})
    alone = [kind for kind, found in kinds.items() if len(found) == 1 or kind == "others"]
    others = [{**row, "series": row["name"].removeprefix("decode ")} for kind in alone for row in kinds.pop(kind)]
    return {**kinds, **({"others": others} if others else {})}


def _label(figure: Any, result: dict[str, Any], names: list[str]) -> None:
    known: dict[str, Any] = {}
    for axis in figure.axes:
        known |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    known = {name: known[name] for name in names if name in known}
    figure.suptitle(
        f"{result.get('op', 'forward').capitalize()} attention on {result['device']}", fontsize=10, x=0.01, ha="left"
    )
    figure.legend(
        known.values(), known.keys(), loc="outside lower right", ncols=max(1, len(known)), fontsize=8, frameon=False
    )


def _panels(result: dict[str, Any]) -> tuple[dict[str, list[Any]], list[Any]]:
    """Series of several lengths, and the rows that have no such company."""
    series: dict[str, list[Any]] = {}
    for row in result["rows"]:
        series.setdefault(row["series"], []).append(row)
    lengths = {name: len({row["length"] for row in rows}) for name, rows in series.items()}
    many = {name: rows for name, rows in series.items() if lengths[name] > 1}
    return many, [row for row in result["rows"] if row["series"] not in many]


def _speed(row: Any, name: str, unit: str = "tflops") -> float:
    return row["participants"].get(name, {}).get(unit, float("nan"))


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


def _bars(axis: Any, rows: list[Any], names: list[str], limit: float, unit: str = "tflops") -> None:
    shown = [name for name in names if any(_speed(row, name, unit) == _speed(row, name, unit) for row in rows)]
    width = 0.8 / max(1, len(shown))
    for i, name in enumerate(shown):
        at = [number + (i - (len(shown) - 1) / 2) * width for number in range(len(rows))]
        axis.bar(at, [_speed(row, name, unit) for row in rows], width, color=COLORS.get(name, "#444444"), label=name)
    axis.axhline(limit, color="#444444", linewidth=0.7, linestyle=":")
    axis.set_xticks(range(len(rows)), [row["series"] or row["name"] for row in rows], rotation=20, ha="right")


def plain(axis: Any) -> None:
    axis.tick_params(labelsize=7.5)
    axis.set_axisbelow(True)
    axis.grid(axis="y", linewidth=0.4, color="#dddddd")
    axis.spines[["top", "right"]].set_visible(False)
