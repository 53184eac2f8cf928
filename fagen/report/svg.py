"""Pieces of SVG: elements, scales, ticks. Colours are classes of the page's stylesheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """An element. `class_` is its class, _ stands for - in names, None leaves an attribute out."""
    words = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    return Markup(f"<{name}{''.join(words)}>{join(inside)}</{name}>")


def join(pieces: Sequence[object]) -> Markup:
    return Markup("").join(escape(piece) for piece in pieces)


def _short(value: object) -> object:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "start", **more: object) -> Markup:
    return tag(
        "text", words, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor, **more
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def picture(width: float, height: float, label: str, *inside: object, class_: str = "", **more: object) -> Markup:
    """A whole picture; `label` is what it says to those who do not see it."""
    size = f"0 0 {width:g} {height:g}"
    return tag("svg", *inside, viewBox=size, class_=class_ or None, role="img", aria_label=label, **more)


@dataclass(frozen=True)
class Scale:
    """From a quantity to a coordinate, linear or logarithmic; what lies outside sits on the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low or 1.0) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        found = [value for value in _decades(self.low, self.high) if self.low <= value <= self.high] if self.log else []
        if len(found) > most:
            decades = [value for value in found if math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9)]
            found = decades if len(decades) >= 2 else found[:: -(-len(found) // most)]
        return found if len(found) >= 3 else _even(self.low, self.high, most)


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]


def _even(low: float, high: float, most: int) -> list[float]:
    """Round steps; never more than `most` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) <= most)
    count = math.floor(high / step) - math.ceil(low / step) + 1
    return [(math.ceil(low / step) + i) * step for i in range(count)]


def times_scale(seconds: Sequence[float], start: float, end: float) -> Scale:
    """For times: logarithmic once they differ enough for that to help, with room around them."""
    low, high = min(seconds), max(seconds)
    if high / low > 2:
        room = (high / low) ** 0.05
        return Scale(low / room, high * room, start, end, log=True)
    room = max((high - low) * 0.08, low * 0.01)
    return Scale(low - room, high + room, start, end)


def unit(seconds: float) -> tuple[float, str]:
    """What one of the unit that suits a time is, and its name."""
    return next(((size, name) for size, name in ((1.0, "s"), (1e-3, "ms")) if seconds >= size), (1e-6, "us"))


def grid(scale: Scale, left: float, right: float, most: int, label: Callable[[float], str]) -> Markup:
    """Horizontal lines at the ticks of a vertical scale, with their labels on the left."""
    pieces = []
    for value in scale.ticks(most):
        y = scale(value)
        pieces += [line(left, y, right, y, "grid"), text(left - 8, y + 4, label(value), "tick", "end")]
    return join(pieces)


def time_grid(scale: Scale, left: float, right: float, most: int = 6) -> Markup:
    """The same for times; the unit stands in the corner."""
    size, name = unit(math.sqrt(scale.low * scale.high) if scale.log else scale.high)
    corner = text(left - 8, min(scale.start, scale.end) - 14, name, "tick", "end")
    return grid(scale, left, right, most, lambda value: f"{value / size:.4g}") + corner


def apart(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places for labels near where they are wanted, none closer to another than `least`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    before = low - least
    for i in order:
        before = placed[i] = max(wanted[i], before + least)
    after = high + least
    for i in reversed(order):
        after = placed[i] = min(placed[i], after - least)
    return placed
