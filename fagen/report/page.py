"""One HTML file of a run's facts: style, script, data and pictures inside, nothing asked of the network."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from fagen.notices import milliseconds
from fagen.report import bars, charts, facts, roofs
from fagen.report.load import Row

MOST_POINTS = 6000  # of a page: a share for each problem, and at least this many:
LEAST_POINTS = 150
MOST_ROWS = 30  # of the table of candidates
_HERE = Path(__file__).parent
# What a point's data holds, by position; page.js reads them under these names.
_POINT = ("n", "outcome", "family", "config", "seconds", "spread", "samples", "reason", "facts", "throttle")


def render(run: Row) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "time": milliseconds, "speed": bars.speed, "plain": charts.words, "span": span, "figure": figure,
        "percent": percent, "times": lambda ratio: f"{ratio:.2f}×" if ratio else "–", "kind": charts.kind,
    }  # fmt: skip
    share = max(LEAST_POINTS, MOST_POINTS // max(1, len(run["problems"])))
    sections = [section(problem, place, share, run) for place, problem in enumerate(run["problems"], 1)]
    script, style = ((_HERE / name).read_text() for name in ("page.js", "page.css"))
    return environment.get_template("page.html.j2").render(
        run=run, sections=sections, style=style, script=script, data=_embedded([s["data"] for s in sections]),
        names=roofs.NAMES, wall=_date(run["begun"]), reasons=facts.MOST_REASONS, **_together(run),
        device=run["target"].get("device") or run["environment"].get("device") or run["run"],
    )  # fmt: skip


def _together(run: Row) -> Row:
    """The pictures of all problems at once."""
    problems = run["problems"] if len(run["problems"]) > 1 else []
    trials = [trial for problem in problems for trial in problem["trials"]]
    return {
        "speeds": bars.speeds(problems, run["machine"]["tflops"]),
        "roofline": roofs.roofline(problems, run["machine"], candidates=False),
        "funnel": bars.funnel(facts.funnel(trials)) if trials else None,
    }


def section(problem: Row, place: int, most: int, run: Row) -> Row:
    """A problem's facts with its pictures."""
    trials = problem["trials"]
    shown = charts.drawn(trials, most)
    clocks = {trial["t"] for trial in trials if trial["t"] is not None}
    return {
        "place": place,
        "facts": problem,
        "shown": len(shown),
        "search": charts.search(problem, shown, "at") if trials else None,
        "over_time": charts.search(problem, shown, "t") if len(clocks) > 1 else None,
        "times": bars.times(problem) if problem["best"] and len(problem["times"]) > 1 else None,
        "funnel": bars.funnel(problem["funnel"]) if trials else None,
        "families": [_family(problem, part, shown) for part in problem["knobs"]],
        "roofline": roofs.roofline([problem], run["machine"], candidates=True),
        "device": roofs.device(problem),
        "fastest": sorted((t for t in trials if t["seconds"]), key=lambda t: t["seconds"])[:MOST_ROWS],
        "changes": changes(problem),
        "data": _data(problem, shown),
    }


def _family(problem: Row, part: Row, shown: list[int]) -> Row:
    told = any(knob["importance"] is not None for knob in part["knobs"])
    return {
        **part,
        "importances": bars.importances(part) if told else None,
        "slices": charts.slices(problem, part, shown),
        "pairs": charts.pairs(problem, part) if told else None,
    }


def changes(problem: Row) -> list[Row]:
    """The winner's knobs beside the default's."""
    best, default = problem["best"], problem["default"]
    if not best:
        return []
    docs = {knob["name"]: knob["doc"] for part in problem["knobs"] for knob in part["knobs"]}
    comparable = set(best["config"]) == set(default)
    return [
        {"knob": name, "value": value, "default": default.get(name) if comparable else None, "doc": docs.get(name, ""),
         "changed": comparable and repr(default[name]) != repr(value)}
        for name, value in best["config"].items()
    ]  # fmt: skip


# ---- data for the script --------------------------------------------------------------------------------------------


def _data(problem: Row, shown: list[int]) -> Row:
    return {
        "default": problem["default"],
        "best": min((t["seconds"] for t in problem["trials"] if t["seconds"]), default=None),
        "points": {i: _point(problem["trials"][i]) for i in shown},
    }


def _point(trial: Row) -> list[Any]:
    throttle = trial["device"].get("throttle") if trial["throttled"] else None
    kept = {**trial, "throttle": throttle, "reason": trial["reason"][:300]}
    kept["facts"] = {name: value for name, value in trial["facts"].items() if isinstance(value, (int, float, str))}
    for name in ("seconds", "spread"):
        kept[name] = float(f"{trial[name]:.4g}") if trial[name] else None
    return [kept[name] for name in _POINT]


def _embedded(sections: list[Row]) -> str:
    """JSON that no tag in a message can end."""
    text = json.dumps({"fields": _POINT, "sections": sections}, separators=(",", ":"), default=str, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---- words ----------------------------------------------------------------------------------------------------------


def span(seconds: float | None) -> str:
    """A stretch of time in its two largest units."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {name}" for count, name in parts[first : first + 2] if count) or "0 s"


def figure(value: float | None, unit: str = "") -> str:
    """Three digits."""
    if value is None:
        return "–"
    shown = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{shown} {unit}".rstrip()


def percent(value: float | None) -> str:
    return f"{value:.0%}" if value is not None else "–"


def _date(seconds: float | None) -> str:
    if seconds is None:
        return ""
    date = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{date.day} {date:%B %Y, %H:%M} UTC"
