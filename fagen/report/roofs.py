"""Where times lie under the machine's roof, and the state the machine was in while they were taken."""

from __future__ import annotations

import itertools

from markupsafe import Markup

from fagen.report import svg
from fagen.report.bars import scaled, speed
from fagen.report.charts import kind
from fagen.report.load import Row, number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 500.0, 330.0, 58.0, 484.0, 26.0, 286.0
MOST_READINGS = 400
NAMES = {
    "clock_mhz": ("clock", "MHz"), "sm_mhz": ("clock", "MHz"), "memory_mhz": ("memory clock", "MHz"),
    "power_w": ("power", "W"), "temp_c": ("temperature", "°C"), "temperature_c": ("temperature", "°C"),
}  # fmt: skip


def roofline(problems: list[Row], machine: Row, candidates: bool) -> Markup | None:
    """TFLOP/s over FLOP a byte. Of one problem with all that was timed, or of many with their winners alone."""
    placed = [p for p in problems if p["work"] and p["best"]]
    if not placed:
        return None
    marks: list[tuple[float, float, str, str]] = []  # intensity, TFLOP/s, class, words
    for problem in placed:
        work = problem["work"]
        if candidates:
            rates = [work["flops"] / t["seconds"] / 1e12 for t in problem["trials"] if t["seconds"]]
            marks += [(work["intensity"], rate, "candidate", "") for rate in _spaced(rates)]
        for entry in problem["times"]:
            role = kind(entry["name"])
            if candidates or role == "winner":
                marks.append((work["intensity"], entry["tflops"], f"dot {role}", entry["name"]))
    ridge = machine["tflops"] * 1e3 / machine["gbs"] if machine["tflops"] and machine["gbs"] else None
    places = [mark[0] for mark in marks] + ([ridge] if ridge else [])
    speeds = [mark[1] for mark in marks]
    highest = max([*speeds, machine["tflops"] or 0.0])
    x = svg.Scale(min(places) / 3, max(places) * 3, LEFT, RIGHT, log=True)
    y = svg.Scale(min(speeds) / 1.6, highest * 1.5, BOTTOM, TOP, log=True)
    factor, unit = scaled(max(speeds))
    pieces = [
        svg.grid(
            y,
            LEFT,
            RIGHT,
            6,
            lambda value: f"{value * factor:,.4g}" if value * factor < 1e4 else f"{value * factor:,.0f}",
        ),
        _across(x, unit),
    ]
    limit = _limit(machine, max(speeds), x, y)
    pieces.append(_roof(machine, limit) if ridge else _fastest(max(speeds), limit))
    for place, rate, class_, name in sorted(marks, key=lambda mark: "winner" in mark[2]):
        said = [svg.tag("title", f"{name} {speed(rate)}")] if name else []
        radius = 5.5 if name else 2.2
        pieces.append(svg.tag("circle", *said, cx=x(place), cy=y(rate), r=radius, class_=class_))
    if candidates:
        pieces.append(_labels(marks, x, y, limit))
    words = "; ".join(f"{name} {speed(rate)}" for _, rate, _, name in marks if name)
    return svg.picture(WIDTH, HEIGHT, f"roofline: {words}", *pieces)


def _spaced(rates: list[float]) -> list[float]:
    """Few enough to draw; they lie on one line."""
    ordered = sorted(rates)
    return ordered[:: -(-len(ordered) // 120)] if ordered else []


def _across(x: svg.Scale, unit: str) -> Markup:
    pieces = [svg.line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"), svg.text(LEFT - 8, TOP - 10, unit, "tick", "middle")]
    for value in x.ticks(8):
        pieces.append(
            svg.text(x(value), BOTTOM + 18, f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}", "tick", "middle")
        )
    name = "FLOP a byte of q, k, v and o"
    return svg.join([*pieces, svg.text((LEFT + RIGHT) / 2, BOTTOM + 38, name, "axis-name", "middle")])


Line = list[tuple[float, float]]


def _limit(machine: Row, fastest: float, x: svg.Scale, y: svg.Scale) -> Line:
    """The line that limits the marks, from left to right: the machine's roof, else the fastest of the marks."""
    flops, bandwidth = machine["tflops"], machine["gbs"]
    if not (flops and bandwidth):
        return [(LEFT, y(fastest)), (RIGHT, y(fastest))]
    start = max(x.low, y.low * 1e3 / bandwidth)
    return [(x(start), y(start * bandwidth / 1e3)), (x(flops * 1e3 / bandwidth), y(flops)), (RIGHT, y(flops))]


def _height(limit: Line, at: float) -> float:
    """Where the line is at an x; it enters the picture from below."""
    if at < limit[0][0]:
        return BOTTOM
    for (x1, y1), (x2, y2) in itertools.pairwise(limit):
        if at <= x2:
            return y1 + (y2 - y1) * (at - x1) / (x2 - x1 or 1.0)
    return limit[-1][1]


def _roof(machine: Row, limit: Line) -> Markup:
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in limit)
    words = f"roof: {machine['gbs']:,.0f} GB/s, {speed(machine['tflops'])}"
    return svg.tag("path", d=d, class_="roof") + _caption(words)


def _fastest(rate: float, limit: Line) -> Markup:
    height = limit[0][1]
    return svg.line(LEFT, height, RIGHT, height, "ref") + _caption(f"line: the fastest here, {speed(rate)}")


def _caption(words: str) -> Markup:
    """Above the picture, where nothing is drawn."""
    return svg.text(RIGHT, TOP - 10, words, "note", "end")


def _labels(marks: list[tuple[float, float, str, str]], x: svg.Scale, y: svg.Scale, limit: Line) -> Markup:
    """A column of words beside the named marks, clear of the line."""
    named = [mark for mark in marks if mark[3]]
    words = [f"{name} {speed(rate)}" for _, rate, _, name in named]
    start, anchor, low, high = _room(x(named[0][0]), max(map(len, words)) * 7.2, 14.0 * len(words), limit)
    heights = svg.apart([y(mark[1]) for mark in named], 14, low, high)
    return svg.join([
        svg.text(start, height + 4, text, "bar-value small", anchor)
        for text, height in zip(words, heights, strict=True)
    ])  # fmt: skip


def _room(at: float, wide: float, tall: float, limit: Line) -> tuple[float, str, float, float]:
    """Where a column of words stands: its x and anchor, and its first and last middle. It is beside the mark at an x,
    under the line if it can be, or in a corner that the line leaves free. The line rises from left to right."""
    left, right = (at - 12, "end", at - 12 - wide), (at + 12, "start", at + 12)
    sides = (left, right) if at > (LEFT + RIGHT) / 2 else (right, left)
    beside = [place for place in sides if 0 < place[2] < WIDTH - wide]

    def under(x: float, anchor: str, first: float) -> tuple[float, str, float, float]:
        return x, anchor, _height(limit, max(first, LEFT)) + 14, BOTTOM - 8

    def above(x: float, anchor: str, first: float) -> tuple[float, str, float, float]:
        return x, anchor, TOP + 8, _height(limit, first + wide) - 12

    rooms = [*(under(*place) for place in beside), *(above(*place) for place in beside)]
    rooms += [above(LEFT + 4, "start", LEFT + 4), under(RIGHT, "end", RIGHT - wide)]
    return next((room for room in rooms if room[3] - room[2] >= tall - 14), rooms[-1])


def device(problem: Row) -> Markup | None:
    """A line a reading, in the order of the candidates; where the device held itself back is marked."""
    state = problem["device"]
    if not state or not state["ranges"]:
        return None
    trials = [t for t in problem["trials"] if t["device"] and t["at"] is not None]
    trials = trials[:: -(-len(trials) // MOST_READINGS)]
    x = svg.Scale(min(t["at"] for t in trials), max(t["at"] for t in trials), 112, WIDTH - 116)
    pieces = []
    for place, (name, extent) in enumerate(state["ranges"].items()):
        top = 10.0 + 54 * place
        title, unit = NAMES.get(name, (name, ""))
        room = (extent["most"] - extent["least"]) or 1.0
        y = svg.Scale(extent["least"] - 0.05 * room, extent["most"] + 0.05 * room, top + 40, top)
        values = [(t, number(t["device"].get(name))) for t in trials]
        path = " ".join(f"{x(t['at']):.1f},{y(v):.1f}" for t, v in values if v is not None)
        pieces.append(svg.text(102, top + 24, title, "bar-name small", "end"))
        pieces.append(svg.tag("polyline", points=path, class_="reading"))
        pieces += [
            svg.tag("circle", cx=x(t["at"]), cy=y(v), r=3.5, class_="hot") for t, v in values if v and t["throttled"]
        ]
        said = f"{extent['least']:.4g}–{extent['most']:.4g} {unit}"
        pieces.append(svg.text(WIDTH - 106, top + 24, said, "bar-value small"))
    label = "; ".join(f"{n} {r['least']:.4g} to {r['most']:.4g}" for n, r in state["ranges"].items())
    return svg.picture(WIDTH, 14 + 54 * len(state["ranges"]), f"state of the device: {label}", *pieces)
