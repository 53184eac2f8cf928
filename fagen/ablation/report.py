"""What an ablation found: a table a series for people and for documents, and CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from fagen.bench.report import aligned, digits, limit, markdown_table

Result = dict[str, Any]
_SIGNS = {"cannot": "–", "same": "=", "failed": "failed", "wrong": "wrong"}


def of_series(result: Result) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for problem in result["problems"]:
        found.setdefault(problem["series"], []).append(problem)
    return found


def length(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def lines(result: Result, title: str, problems: list[Result]) -> list[tuple[str, ...]]:
    """The head and a line a step: TFLOP/s by length, and the gain over the step before, geometric mean and range."""
    head = (f"{title}, TFLOP/s", *(length(problem["length"]) for problem in problems), "gain", "from", "to")
    found, summed = [head], result["summary"].get(title, {})
    for step in result["steps"]:
        cells = [_cell(problem["steps"].get(step["name"], {})) for problem in problems]
        gain = summed.get(step["name"])
        gains = [f"{gain[name]:.2f}x" for name in ("gain", "least", "most")] if gain else ["", "", ""]
        found.append((step["name"], *cells, *gains))
    return found


def speed(tflops: float) -> str:
    """Three digits of a GPU's figures, two of a slow CPU's."""
    return digits(tflops) if tflops >= 1 else f"{tflops:.3f}"


def _cell(facts: Result) -> str:
    outcome: str = facts.get("outcome", "cannot")
    return (
        (digits if facts["tflops"] >= 1 else "{:.3f}".format)(facts["tflops"]) if outcome == "ok" else _SIGNS[outcome]
    )


def line(problem: Result) -> str:
    """A problem while the run goes on."""
    cells = [f"{name} {_cell(facts)}" for name, facts in problem["steps"].items() if facts["outcome"] != "same"]
    return f"{problem['series']} s{length(problem['length'])}  {'  '.join(cells)}"


def tables(result: Result) -> str:
    return "\n\n".join(aligned(lines(result, title, problems)) for title, problems in of_series(result).items())


def closing(result: Result) -> list[str]:
    """What was not measured and why, a line a reason; the machine's own rate."""
    reasons: dict[str, list[str]] = {}
    for problem in result["problems"]:
        for name, facts in problem["steps"].items():
            if facts["outcome"] in ("cannot", "failed", "wrong"):
                where = f"{facts['outcome']}: {name}: {facts['reason']}"
                reasons.setdefault(where, []).append(f"{problem['series']} s{length(problem['length'])}")
    every = len(result["problems"])
    found = [f"{why} ({'everywhere' if len(where) == every else ', '.join(where)})" for why, where in reasons.items()]
    if result["limit"]["samples"]:
        found.append(limit(result["limit"]))
    return found


def steps(result: Result) -> list[tuple[str, str, str]]:
    """Name, what it changes, what that is."""
    return [(step["name"], _stated(step), step["says"]) for step in result["steps"]]


def _stated(step: Result) -> str:
    words = [f"`{step['family']}`"] if step["starts"] else []
    for what, settings in step["states"].items():
        named = [f"`{k}={str(v).lower() if isinstance(v, bool) else v}`" for k, v in settings.items()]
        words += ["causal:", *named] if what == "causal" and named else named
    words += [f"`{step['variant']}`"] if step["variant"] else []
    return " ".join(words) or ("–" if not step["tuned"] else "all")


def gains(result: Result) -> list[tuple[str, ...]]:
    """A line a step: its gain in each series, geometric mean over the lengths."""
    summed = result["summary"]
    found = [("gain over the step before", *of_series(result))]
    for step in result["steps"]:
        each = [summed.get(title, {}).get(step["name"]) for title in of_series(result)]
        found.append((step["name"], *(f"{gain['gain']:.2f}x" if gain else "" for gain in each)))
    return found


def markdown(result: Result) -> str:
    """To be put into a document: the steps, what each gains, then a table a series."""
    parts = [markdown_table([("step", "changes", "what that is"), *steps(result)], numbers=False)]
    parts.append(markdown_table(gains(result)))
    parts += [markdown_table(lines(result, title, problems)) for title, problems in of_series(result).items()]
    parts.append("\n".join(f"- {text}" for text in closing(result)))
    return "\n\n".join(parts) + "\n"


_COLUMNS = (
    "outcome",
    "family",
    "seconds",
    "spread",
    "samples",
    "tflops",
    "gain",
    "over",
    "error_over_bound",
    "verified",
)


def as_csv(result: Result) -> str:
    """A line a problem and step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "series", "length", "step", *_COLUMNS, "config", "reason"])
    for problem in result["problems"]:
        for name, facts in problem["steps"].items():
            config = " ".join(f"{knob}={value}" for knob, value in facts.get("config", {}).items())
            values = [facts.get(column, "") for column in _COLUMNS]
            writer.writerow(
                [problem["key"], problem["series"], problem["length"], name, *values, config, facts.get("reason", "")]
            )
    return text.getvalue()
