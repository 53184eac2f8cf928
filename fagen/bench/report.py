"""What a run found, as a table for people, as markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from fagen.bench.peers import OURS, PEERS

Result = dict[str, Any]
NOT_OURS = "*"  # behind a figure of ours that PyTorch computed


def speed(tflops: float) -> str:
    """Three digits of a GPU's figures, two of a slow CPU's."""
    return f"{tflops:.{0 if tflops >= 100 else 1 if tflops >= 10 else 2 if tflops >= 1 else 3}f}"


def _cell(row: Result, name: str) -> str:
    facts = row["participants"].get(name, {})
    if "tflops" not in facts:
        return facts.get("outcome", "–") if facts.get("outcome") == "wrong" or name == OURS else "–"
    mark = NOT_OURS if name == OURS and row["choice"].get("served_by") == "torch" else ""
    return speed(facts["tflops"]) + mark


def ratio(value: float | None) -> str:
    return f"{value:.3f}x" if value else "–"


def participants(result: Result) -> list[str]:
    """Ours, then the peers that are here."""
    return [OURS, *(name for name, facts in result["peers"].items() if not facts["absent"])]


def lines(result: Result) -> list[tuple[str, ...]]:
    """The head and a line a row: name, TFLOP/s of each participant, the ratio to the best peer, share of the limit."""
    names = participants(result)
    found: list[tuple[str, ...]] = [("TFLOP/s", *names, "ratio", "of limit")]
    for row in result["rows"]:
        share = row["participants"][OURS].get("share")
        cells = [_cell(row, name) for name in names]
        found.append((row["name"], *cells, ratio(row["ratio"]), f"{share:.0%}" if share else "–"))
    return found


def line(row: Result, names: list[str]) -> str:
    """A row while the run goes on."""
    cells = "  ".join(f"{name} {_cell(row, name)}" for name in names)
    return f"{row['name']:<44}  {cells}  {ratio(row['ratio'])}"


def aligned(cells: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = [
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]) for r in cells
    ]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def table(result: Result) -> str:
    return aligned(lines(result)) if result["rows"] else ""


def closing(result: Result) -> list[str]:
    """The figures that sum a run up, and what kept others out of it."""
    found, summary = [], result["summary"]
    if summary["geometric_mean"]:
        worst = summary["worst"]
        found.append(
            f"ours / best peer: geometric mean {ratio(summary['geometric_mean'])} over {summary['compared']} rows, "
            f"ahead on {summary['ahead']}, worst {ratio(worst['ratio'])} ({worst['name']})"
        )
    if result["limit"]["samples"]:
        samples = ", ".join(speed(sample["tflops"]) for sample in result["limit"]["samples"])
        found.append(f"limit: {result['limit']['what']}, {samples} TFLOP/s in the course of the run")
    if summary["ours_by_torch"]:
        found.append(f"{NOT_OURS} no kernel of ours, PyTorch computed: {', '.join(summary['ours_by_torch'])}")
    for row in result["rows"]:
        for name, facts in row["participants"].items():
            if facts["outcome"] == "wrong" or (name == OURS and facts["outcome"] != "ok"):
                found.append(f"{facts['outcome']}: {name} on {row['name']}: {facts.get('reason', '')}")
    return found + _eager(result["rows"]) + absent(result["peers"])


def _eager(rows: list[Result]) -> list[str]:
    """Who could not be captured into a graph, so that the host's time is in its figures."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, facts in row["participants"].items():
            if "not_captured" in facts:
                found.setdefault(name, []).append(facts["not_captured"])
    return [f"timed eagerly: {name} on {len(why)} rows: {why[0]}" for name, why in found.items()]


def absent(peers: Result) -> list[str]:
    """A line a reason, for all peers that are kept out by it."""
    reasons: dict[str, list[str]] = {}
    for name, facts in peers.items():
        if facts["absent"]:
            reasons.setdefault(facts["absent"], []).append(name)
    return [f"absent: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def host(result: Result) -> list[str]:
    """Host time of a call, the quickest first."""
    found = result["host"]["participants"]
    times = {name: facts["microseconds"] for name, facts in found.items() if "microseconds" in facts}
    text = ", ".join(f"{name} {times[name]:.1f}" for name in sorted(times, key=lambda name: times[name]))
    refused = [f"host time of {name}: {facts['reason']}" for name, facts in found.items() if "reason" in facts]
    return [f"host time of a call, us, {result['host']['problem']}: {text or 'none'}", *refused]


def _label(name: str) -> str:
    return PEERS[name].label if name in PEERS else name


def markdown(result: Result) -> str:
    """Figures to be put into a document, with the command that made them."""
    names, cells = participants(result), lines(result)
    head = ("row", *(_label(name) for name in names), "ratio", "of limit")
    rules = ("---", *("---:" for _ in head[1:]))
    body = ["| " + " | ".join(row) + " |" for row in (head, rules, *(_bold(row, len(names)) for row in cells[1:]))]
    facts = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    extra = closing(result) + (host(result) if result["host"] else [])
    notes = [f"- {text}" for text in extra]
    return "\n".join(
        [f"TFLOP/s on {result['device']}; `{result['command']}`", "", *body, "", *notes, "", f"{facts}", ""]
    )


def _bold(row: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The fastest of a row stands out."""

    def value(text: str) -> float:
        return float(text.rstrip(NOT_OURS)) if text[0].isdigit() else 0.0

    best = max(map(value, row[1 : 1 + count]))
    cells = [f"**{c}**" if value(c) == best > 0 else c.replace(NOT_OURS, "\\" + NOT_OURS) for c in row[1 : 1 + count]]
    return (row[0], *cells, *row[1 + count :])


_COLUMNS = ("outcome", "seconds", "spread", "samples", "tflops", "share", "error", "error_over_bound", "verified")


def as_csv(result: Result) -> str:
    """A line a row and participant."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "key", "flops", "participant", *_COLUMNS, "ratio", "reason"])
    for row in result["rows"]:
        for name, facts in row["participants"].items():
            values = [facts.get(column, "") for column in _COLUMNS]
            writer.writerow(
                [row["name"], row["key"], row["flops"], name, *values,
                 row["ratio"] if name == OURS else "", facts.get("reason", "")]
            )  # fmt: skip
    return text.getvalue()
