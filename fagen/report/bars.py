"""Bars: the winner against others, the gates that candidates pass, importances of knobs, all problems of a run."""

from __future__ import annotations

from markupsafe import Markup

from fagen.notices import milliseconds
from fagen.report import svg
from fagen.report.charts import kind
from fagen.report.load import Row

WIDTH = 500.0


def speed(tflops: float | None) -> str:
    """In the unit that suits it."""
    if tflops is None:
        return "–"
    value, unit = (tflops, "TFLOP/s") if tflops >= 1 else (tflops * 1e3, "GFLOP/s")
    return f"{value:.{0 if value >= 100 else 1}f} {unit}"


def scaled(highest: float) -> tuple[float, str]:
    """What TFLOP/s are multiplied by on an axis that ends there, and the unit's name."""
    return (1.0, "TFLOP/s") if highest >= 1 else (1e3, "GFLOP/s")


def times(problem: Row) -> Markup:
    """Bars from zero, fastest first, with their spread."""
    entries, left, right = problem["times"], 128.0, WIDTH - 118
    best = problem["best"]["seconds"]
    x = svg.Scale(0, max(e["seconds"] + (e["spread"] or 0) for e in entries), left, right)
    pieces = []
    for place, entry in enumerate(entries):
        y, end = 8.0 + 36 * place, x(entry["seconds"])
        pieces.append(svg.text(left - 10, y + 17, entry["name"], "bar-name", "end"))
        role = kind(entry["name"])
        pieces.append(svg.tag("rect", x=left, y=y + 2, width=end - left, height=20, rx=3, class_=f"bar {role}"))
        if entry["spread"]:
            low, high = x(max(0.0, entry["seconds"] - entry["spread"])), x(entry["seconds"] + entry["spread"])
            d = f"M{low:.1f} {y + 12:.1f}H{high:.1f}M{low:.1f} {y + 7:.1f}v10M{high:.1f} {y + 7:.1f}v10"
            pieces.append(svg.tag("path", d=d, class_="whisker"))
            end = max(end, high)
        ratio = entry["seconds"] / best
        said = milliseconds(entry["seconds"]) + ("" if role == "winner" else f" · {ratio:.2f}×")
        pieces.append(svg.text(end + 8, y + 17, said, "bar-value"))
    label = "; ".join(f"{e['name']} {milliseconds(e['seconds'])}" for e in entries)
    return svg.picture(WIDTH, 8 + 36 * len(entries), label, *pieces)


def funnel(stages: list[Row]) -> Markup:
    left, right = 76.0, WIDTH - 216
    x = svg.Scale(0, max(1, stages[0]["count"]), 0, right - left)
    pieces = []
    for place, stage in enumerate(stages):
        y, width = 8.0 + 36 * place, x(stage["count"])
        pieces.append(svg.text(left - 10, y + 17, stage["gate"], "bar-name", "end"))
        pieces.append(svg.tag("rect", x=left, y=y + 2, width=x.end, height=20, rx=3, class_="bar-back"))
        pieces.append(svg.tag("rect", x=left, y=y + 2, width=width, height=20, rx=3, class_="bar gate"))
        pieces.append(svg.text(left + x.end + 8, y + 17, f"{stage['count']:,}", "bar-value"))
        lost = [f"−{count:,} {outcome}" for outcome, count in stage["lost"].items()]
        lines = [", ".join(lost[i : i + 2]) for i in range(0, len(lost), 2)]
        start = y + 17 - 6.5 * (len(lines) - 1)
        pieces += [svg.text(left + x.end + 56, start + 13 * i, said, "note") for i, said in enumerate(lines)]
    label = ", ".join(f"{stage['gate']} {stage['count']}" for stage in stages)
    return svg.picture(WIDTH, 8 + 36 * len(stages), label, *pieces)


def importances(part: Row) -> Markup:
    """A bar for PED-ANOVA, a ring for the variance that the knob explains alone."""
    knobs, width = part["knobs"], 720.0
    left, right = 130.0, width - 60
    x = svg.Scale(0, max([0.01, *(max(k["importance"] or 0, k["alone"] or 0) for k in knobs)]), left, right)
    pieces = []
    for place, knob in enumerate(knobs):
        y = 4.0 + 24 * place
        importance, alone = knob["importance"] or 0.0, knob["alone"] or 0.0
        pieces.append(svg.text(left - 10, y + 14, knob["name"], "bar-name small", "end"))
        pieces.append(svg.tag("rect", x=left, y=y + 3, width=x(importance) - left, height=14, rx=2, class_="bar knob"))
        pieces.append(svg.tag("circle", cx=x(alone), cy=y + 10, r=4, class_="alone"))
        pieces.append(svg.text(right + 14, y + 14, f"{importance:.0%}", "bar-value small"))
    label = ", ".join(f"{k['name']} {k['importance'] or 0:.0%}" for k in knobs)
    return svg.picture(width, 8 + 24 * len(knobs), label, *pieces)


def speeds(problems: list[Row], roof: float | None) -> Markup | None:
    """A line a problem: the speed of the default, of PyTorch and of the winner."""
    rows = [(place, p) for place, p in enumerate(problems, 1) if p["best"] and p["work"]]
    rates = [entry["tflops"] for _, p in rows for entry in p["times"] if entry["tflops"]]
    if not rates:
        return None
    left, right, width, top = 330.0, 960.0, 1000.0, 22.0
    x = svg.Scale(0, max([*rates, *([roof] if roof and roof < 4 * max(rates) else [])]) * 1.02, left, right)
    bottom, (factor, unit) = top + 24 * len(rows), scaled(max(rates))
    pieces = []
    for value in x.ticks(8):
        pieces += [svg.line(x(value), top, x(value), bottom, "grid"),
                   svg.text(x(value), bottom + 18, f"{value * factor:g}", "tick", "middle")]  # fmt: skip
    if roof and roof <= x.high:
        pieces += [svg.line(x(roof), top - 4, x(roof), bottom, "roof"),
                   svg.text(x(roof), top - 9, f"machine {roof * factor:.4g}", "note", "end")]  # fmt: skip
    for line, (place, problem) in enumerate(rows):
        y = top + 24 * line + 12
        found = {entry["name"]: entry["tflops"] for entry in problem["times"]}
        name = svg.text(left - 12, y + 4, f"{place}  {problem['key'].partition('/')[2]}", "bar-name small", "end")
        pieces.append(svg.tag("a", name, href=f"#problem-{place}"))
        ends = [x(value) for value in found.values()]
        pieces.append(svg.line(min(ends), y, max(ends), y, "span"))
        for who, value in sorted(found.items(), key=lambda item: kind(item[0]) == "winner"):
            title = svg.tag("title", f"{who} {speed(value)}")
            pieces.append(svg.tag("circle", title, cx=x(value), cy=y, r=5.5, class_=f"dot {kind(who)}"))
    pieces.append(svg.text((left + right) / 2, bottom + 36, unit, "axis-name", "middle"))
    return svg.picture(width, bottom + 42, "speed of each problem's winner, default and PyTorch", *pieces)
