"""Where times lie under the machine's roof, and the state the machine was in while they were taken."""

from __future__ import annotations

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
    pieces.append(_roof(machine, x, y) if ridge else _fastest(max(speeds), y))
    for place, rate, class_, name in sorted(marks, key=lambda mark: "winner" in mark[2]):
        said = [svg.tag("title", f"{name} {speed(rate)}")] if name else []
        radius = 5.5 if name else 2.2
        pieces.append(svg.tag("circle", *said, cx=x(place), cy=y(rate), r=radius, class_=class_))
    if candidates:
        pieces.append(_labels(marks, x, y))
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


def _roof(machine: Row, x: svg.Scale, y: svg.Scale) -> Markup:
    flops, bandwidth = machine["tflops"], machine["gbs"]
    start = max(x.low, y.low * 1e3 / bandwidth)
    ridge = flops * 1e3 / bandwidth
    d = f"M{x(start):.1f} {y(start * bandwidth / 1e3):.1f}L{x(ridge):.1f} {y(flops):.1f}H{RIGHT:.1f}"
    name = svg.text(RIGHT - 4, y(flops) - 7, speed(flops), "note", "end")
    slope = svg.text(x(ridge) - 10, y(flops) - 7, f"{bandwidth:,.0f} GB/s", "note", "end")
    return svg.join([svg.tag("path", d=d, class_="roof"), name, slope])


def _fastest(rate: float, y: svg.Scale) -> Markup:
    label = svg.text(LEFT + 4, y(rate) - 7, f"the fastest here, {speed(rate)}", "note")
    return svg.join([svg.line(LEFT, y(rate), RIGHT, y(rate), "ref"), label])


def _labels(marks: list[tuple[float, float, str, str]], x: svg.Scale, y: svg.Scale) -> Markup:
    named = [mark for mark in marks if mark[3]]
    heights = svg.apart([y(mark[1]) for mark in named], 14, TOP + 8, BOTTOM - 4)
    left = x(named[0][0]) > (LEFT + RIGHT) / 2
    side, anchor = (-12, "end") if left else (12, "start")
    return svg.join([
        svg.text(x(place) + side, height + 4, f"{name} {speed(rate)}", "bar-value small", anchor)
        for (place, rate, _, name), height in zip(named, heights, strict=True)
    ])  # fmt: skip


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
