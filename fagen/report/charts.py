"""The pictures of a search: every candidate in its order, the best so far, and what each knob's values did."""

from __future__ import annotations

import math
import statistics

from markupsafe import Markup

from fagen.notices import milliseconds
from fagen.report import svg
from fagen.report.facts import FEW
from fagen.report.load import Row
from fagen.tuner.messages import OUTCOMES

LANES = OUTCOMES[1:]  # of those without a time, from the top
WIDTH, LEFT, RIGHT, TOP, HIGH, LANE = 1000.0, 84.0, 846.0, 30.0, 290.0, 17.0
SLICE_WIDTH, SLICE_HEIGHT = 330.0, 200.0
SLICED, MOST_IN_SLICE = 6, 300  # knobs, points


def drawn(trials: list[Row], most: int) -> list[int]:
    """Which candidates are drawn: all, or each that improved the best and the others evenly thinned out."""
    if len(trials) <= most:
        return list(range(len(trials)))
    steps = set(improvements(trials))
    others = [i for i in range(len(trials)) if i not in steps]
    room = max(1, most - len(steps))
    return sorted([*steps, *(others[i * len(others) // room] for i in range(min(room, len(others))))])


def improvements(trials: list[Row]) -> list[int]:
    best, found = math.inf, []
    for i, trial in enumerate(trials):
        if trial["seconds"] and trial["seconds"] < best:
            best = trial["seconds"]
            found.append(i)
    return found


# ---- every candidate ------------------------------------------------------------------------------------------------


def search(problem: Row, shown: list[int], by: str) -> Markup:
    """`by` is "at", the candidates' order, or "t", the time worked until then."""
    trials = problem["trials"]
    lanes = [o for o in (*LANES, *_strange(trials)) if any(t["outcome"] == o for t in trials)]
    times = [t["seconds"] for t in trials if t["seconds"]]
    bottom = (TOP + HIGH if times else TOP) + 8 + LANE * len(lanes)
    most = max((t[by] or 0.0 for t in trials), default=1.0)
    x = (
        svg.Scale(0.5, most + 0.5, LEFT + 6, RIGHT - 6)
        if by == "at"
        else svg.Scale(0, most or 1.0, LEFT + 6, RIGHT - 6)
    )
    pieces = [_across(x, bottom, by), _pauses(trials, x, bottom, by)]
    if times:
        others = [e for e in problem["times"] if kind(e["name"]) != "winner"]
        near = [e["seconds"] for e in others if e["seconds"] <= 1.3 * max(times)]
        y = svg.times_scale([*times, *near], TOP + HIGH, TOP)
        pieces += [svg.time_grid(y, LEFT, RIGHT), _references(min(times), others, y)]
        pieces.append(_spreads(trials, shown, x, y, by))
        pieces += [_points(trials, shown, x, y, by), _best(trials, x, y, by)]
    pieces += [_lane(trials, shown, o, x, bottom - LANE * (len(lanes) - i), by) for i, o in enumerate(lanes)]
    words = f"{len(trials)} candidates in order, {len(times)} timed"
    if times:
        words += f", the fastest {milliseconds(min(times))}"
    return svg.picture(WIDTH, bottom + 44, words, *pieces, class_="points", tabindex="0")


def _strange(trials: list[Row]) -> list[str]:
    """Outcomes of other versions; an ok without a time is one as well."""
    return list(dict.fromkeys(t["outcome"] for t in trials if t["outcome"] not in OUTCOMES or _untimed(t)))


def _untimed(trial: Row) -> bool:
    return trial["outcome"] == "ok" and not trial["seconds"]


def _across(x: svg.Scale, bottom: float, by: str) -> Markup:
    name, size = "candidate", 1.0
    if by == "t":
        name, size = next(
            u for u in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0)) if x.high >= 2 * u[1] or u[1] == 1
        )
    scaled = svg.Scale(x.low / size, x.high / size, x.start, x.end)
    pieces = [svg.line(LEFT, bottom, RIGHT, bottom, "axis")]
    for value in scaled.ticks(10):
        if by == "at" and value % 1:
            continue
        pieces.append(svg.text(scaled(value), bottom + 18, f"{value:g}", "tick", "middle"))
    label = name if by == "at" else f"{name} of work"
    return svg.join([*pieces, svg.text((LEFT + RIGHT) / 2, bottom + 38, label, "axis-name", "middle")])


def _pauses(trials: list[Row], x: svg.Scale, bottom: float, by: str) -> Markup:
    pieces = []
    for trial in trials:
        if trial["pause"]:
            at = x((trial[by] or 0.0) - (0.5 if by == "at" else 0.0))
            pieces += [
                svg.line(at, TOP - 6, at, bottom, "pause"),
                svg.text(at + 5, TOP - 10, _waited(trial["pause"]), "note"),
            ]
    return svg.join(pieces)


def _waited(seconds: float) -> str:
    size, name = next(u for u in ((86400, "days"), (3600, "h"), (60, "min")) if seconds >= u[0] or u[0] == 60)
    return f"resumed after {seconds / size:.0f} {name}"


def _references(fastest: float, others: list[Row], y: svg.Scale) -> Markup:
    """What the search had to beat, and where it got, with the labels at the right edge; an arrow: far above."""
    labels = [("best", fastest, "best-label"), *((e["name"], e["seconds"], _label(e["name"])) for e in others)]
    places = svg.apart([y(seconds) for _, seconds, _ in labels], 15, TOP, TOP + HIGH)
    pieces = []
    for (name, seconds, class_), at in zip(labels, places, strict=True):
        far = seconds > y.high
        if name != "best" and not far:
            pieces.append(svg.line(LEFT, y(seconds), RIGHT, y(seconds), f"ref ref-{kind(name)}"))
        if not far:
            pieces.append(
                svg.tag("path", d=f"M{RIGHT + 2:.0f} {y(seconds):.1f}L{RIGHT + 9:.0f} {at:.1f}", class_="lead")
            )
        words = f"{name} {milliseconds(seconds)}"
        pieces.append(svg.text(RIGHT + 12, at + 4, f"↑ {words}" if far else words, class_))
    return svg.join(pieces)


def _label(name: str) -> str:
    return f"ref-label ref-{kind(name)}"


def kind(name: str) -> str:
    """The class of its colour."""
    return {"default": "default", "PyTorch": "torch", "winner": "winner", "fastest so far": "winner"}.get(name, "peer")


def _spreads(trials: list[Row], shown: list[int], x: svg.Scale, y: svg.Scale, by: str) -> Markup:
    """Half the interquartile range to both sides, where it is larger than its point."""
    parts = []
    for trial in (trials[i] for i in shown):
        if trial["seconds"] and trial["spread"] and trial[by] is not None:
            low = y(max(trial["seconds"] - trial["spread"], y.low))
            high = y(trial["seconds"] + trial["spread"])
            if low - high > 7:
                parts.append(f"M{x(trial[by]):.1f} {low:.1f}V{high:.1f}")
    return svg.tag("path", d="".join(parts), class_="spread") if parts else Markup("")


def _points(trials: list[Row], shown: list[int], x: svg.Scale, y: svg.Scale, by: str) -> Markup:
    steps, families = set(improvements(trials)), list(dict.fromkeys(t["family"] for t in trials if t["seconds"]))
    pieces = []
    for i in shown:
        trial = trials[i]
        if trial["seconds"] and trial[by] is not None:
            words = ["step" if i in steps else "short" if 0 < trial["samples"] <= FEW else ""]
            words += ["hot"] * trial["throttled"] + ["other"] * bool(families.index(trial["family"]))
            pieces.append(
                svg.tag("circle", cx=x(trial[by]), cy=y(trial["seconds"]), r=4.5 if i in steps else 3.2,
                        class_=" ".join(filter(None, words)) or None, data_i=i)
            )  # fmt: skip
    return svg.tag("g", *pieces, class_="ok")


def _best(trials: list[Row], x: svg.Scale, y: svg.Scale, by: str) -> Markup:
    steps = [trials[i] for i in improvements(trials) if trials[i][by] is not None]
    if not steps:
        return Markup("")
    path = f"M{x(steps[0][by]):.1f} {y(steps[0]['seconds']):.1f}"
    path += "".join(f"H{x(step[by]):.1f}V{y(step['seconds']):.1f}" for step in steps[1:])
    return svg.tag("path", d=f"{path}H{RIGHT:.1f}", class_="best")


def _lane(trials: list[Row], shown: list[int], outcome: str, x: svg.Scale, top: float, by: str) -> Markup:
    """A row of marks for the candidates that ended this way."""
    own = [
        i for i in shown if trials[i]["outcome"] == outcome and not trials[i]["seconds"] and trials[i][by] is not None
    ]
    marks = [svg.tag("rect", x=x(trials[i][by]) - 1.1, y=top + 3, width=2.2, height=LANE - 6, data_i=i) for i in own]
    name = svg.text(LEFT - 8, top + LANE - 5, outcome, "lane-name", "end")
    known = outcome if outcome in OUTCOMES else "unknown"
    base = svg.line(LEFT, top + LANE, RIGHT, top + LANE, "lane")
    return svg.tag("g", base, name, *marks, class_=f"lane-of {known}")


# ---- knob by knob ---------------------------------------------------------------------------------------------------


def slices(problem: Row, part: Row, shown: list[int]) -> list[tuple[Row, Markup]]:
    """A picture for each of the knobs that matter most: times by value."""
    trials = problem["trials"]
    own = [i for i in shown if trials[i]["seconds"] and trials[i]["family"] == part["family"]]
    thinned = [own[i] for i in drawn([trials[i] for i in own], MOST_IN_SLICE)]
    varied = [knob for knob in part["knobs"] if len(knob["values"]) > 1][:SLICED]
    times = sorted(trials[i]["seconds"] for i in own)
    if not times:
        return []
    top = max(times[min(len(times) - 1, int(0.9 * len(times)))], times[0] * 1.1)
    failures = any(value["tried"] > value["timed"] for knob in varied for value in knob["values"])
    y = svg.times_scale([times[0], top], SLICE_HEIGHT - (40 if failures else 26), 30)
    return [(knob, _slice(trials, knob, thinned, y)) for knob in varied]


def _slice(trials: list[Row], knob: Row, shown: list[int], y: svg.Scale) -> Markup:
    left, right = 46.0, SLICE_WIDTH - 6
    width = (right - left) / len(knob["values"])
    fastest = min((v["best"] for v in knob["values"] if v["best"]), default=None)
    pieces, size = [svg.time_grid(y, left, right, 4)], _small(knob, width)
    for place, value in enumerate(knob["values"]):
        middle = left + (place + 0.5) * width
        own = [i for i in shown if repr(trials[i]["config"].get(knob["name"])) == repr(value["value"])]
        reach = min(width * 0.36, 26)
        for turn, i in enumerate(own):  # spread out by the golden ratio, the same way each time
            at = middle + ((turn * 0.618) % 1 - 0.5) * 2 * reach
            pieces.append(svg.tag("circle", cx=at, cy=y(trials[i]["seconds"]), r=2.6, data_i=i))
        if value["median"]:
            at = y(value["median"])
            pieces.append(svg.line(middle - reach, at, middle + reach, at, "median"))
            low = y(value["best"])
            kind = "top first" if value["best"] == fastest else "top"
            d = f"M{middle:.1f} {low - 5:.1f}l5 5l-5 5l-5 -5z"
            pieces.append(svg.tag("path", d=d, class_=kind))
        pieces.append(svg.text(middle, y.start + 17, words(value["value"]), "tick value", "middle", style=size))
        failed = value["tried"] - value["timed"]
        if failed:
            pieces.append(svg.text(middle, y.start + 32, f"{failed}×", "tick failed", "middle"))
    pieces.append(svg.line(left, y.start + 2, right, y.start + 2, "axis"))
    label = f"time by {knob['name']}: " + ", ".join(
        f"{words(v['value'])} at best {milliseconds(v['best'])}" for v in knob["values"] if v["best"]
    )
    return svg.picture(SLICE_WIDTH, SLICE_HEIGHT, label, *pieces, class_="points slice")


def _small(knob: Row, room: float) -> str | None:
    """The style of a knob's values below their columns, so that none runs into the next."""
    size = room / (0.6 * max(len(words(value["value"])) for value in knob["values"]))
    return f"font-size:{size:.1f}px" if size < 11.5 else None


def words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def pairs(problem: Row, part: Row) -> tuple[str, str, Markup] | None:
    """The fastest time for each pair of values of the two knobs that matter most, as a ratio to the best of all."""
    varied = [knob for knob in part["knobs"] if len(knob["values"]) > 1][:2]
    timed = [t for t in problem["trials"] if t["seconds"] and t["family"] == part["family"]]
    if len(varied) < 2 or not timed:
        return None
    down, across = varied
    cells: dict[tuple[str, str], list[float]] = {}
    for trial in timed:
        place = (repr(trial["config"].get(down["name"])), repr(trial["config"].get(across["name"])))
        cells.setdefault(place, []).append(trial["seconds"])
    best = min(map(min, cells.values()))
    left, top, right, bottom = 84.0, 26.0, SLICE_WIDTH - 6, SLICE_HEIGHT - 26
    w, h = (right - left) / len(across["values"]), (bottom - top) / len(down["values"])
    size = _small(across, w)
    pieces = [svg.text(left - 8, top - 10, f"{down['name']} ↓", "tick", "end")]
    for j, value in enumerate(across["values"]):
        pieces.append(
            svg.text(left + (j + 0.5) * w, bottom + 15, words(value["value"]), "tick value", "middle", style=size)
        )
    for i, row in enumerate(down["values"]):
        pieces.append(svg.text(left - 8, top + (i + 0.5) * h + 4, words(row["value"]), "tick value", "end"))
        for j, column in enumerate(across["values"]):
            found = cells.get((repr(row["value"]), repr(column["value"])))
            pieces.append(_cell(left + j * w, top + i * h, w, h, found, best))
    label = f"the fastest by {down['name']} and {across['name']}, as a multiple of the best: " + "; ".join(
        f"{row} with {column} {min(found) / best:.2f}" for (row, column), found in cells.items()
    )
    return down["name"], across["name"], svg.picture(SLICE_WIDTH, SLICE_HEIGHT, label, *pieces, class_="pairs")


def _cell(x: float, y: float, w: float, h: float, found: list[float] | None, best: float) -> Markup:
    box = {"x": x + 1, "y": y + 1, "width": max(1.0, w - 2), "height": max(1.0, h - 2)}
    if not found:
        return svg.tag("rect", **box, class_="never")
    ratio = min(found) / best
    strength = max(0.06, 0.95 * math.exp(-6 * (ratio - 1)))
    label = svg.text(x + w / 2, y + h / 2 + 4, f"{ratio:.2f}", "strong" if strength > 0.5 else "weak", "middle")
    title = svg.tag(
        "title", f"{ratio:.3f} of the best; median {statistics.median(found) / best:.2f}; {len(found)} timed"
    )
    return svg.tag("g", svg.tag("rect", **box, style=f"fill-opacity:{strength:.2f}"), label, title)
