"""What a run found, as a table for people, as markdown, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from fagen.bench.peers import OURS, PEERS, PLAIN

Result = dict[str, Any]
_MOST_BEHIND = 12  # rows that are named
_MOST_MEMORY = 8
NOT_OURS = "*"  # behind a figure of ours that PyTorch computed


def digits(value: float) -> str:
    """Three digits."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def on_cpu(result: Result) -> bool:
    return result.get("arch") == "cpu"


def _flops(tflops: float, cpu: bool) -> str:
    return digits(tflops * 1e3 if cpu else tflops)


def _unit(cpu: bool) -> str:
    return "GFLOP/s" if cpu else "TFLOP/s"


def rates(sample: Result, cpu: bool = False) -> str:
    """The machine's, and the state it was in."""
    known = ("when", "tflops", "gbps", "read_gbps", "throttled")
    state = [f"{value:.0f} {name}" for name, value in sample.items() if name not in known]
    if "read_gbps" in sample:
        state.insert(0, f"{sample['read_gbps']:.0f} GB/s read")
    return ", ".join([f"{_flops(sample['tflops'], cpu)} {_unit(cpu)}", f"{sample['gbps']:.0f} GB/s", *state])


def _cell(row: Result, name: str, cpu: bool = False) -> str:
    """FLOP/s, or GB/s of a row that memory bounds; with its spread on a CPU, which others use as well."""
    facts = row["participants"].get(name, {})
    if "tflops" not in facts:
        return facts.get("outcome", "–") if facts.get("outcome") == "wrong" or name == OURS else "–"
    mark = NOT_OURS if name == OURS and row["choice"].get("served_by") == "torch" else ""
    found = digits(facts["gbps"]) if row["bound"] == "memory" else _flops(facts["tflops"], cpu)
    return found + (f" ±{facts['spread'] / facts['seconds']:.0%}" if cpu else "") + mark


def ratio(value: float | None) -> str:
    return f"{value:.3f}x" if value else "–"


def participants(result: Result) -> list[str]:
    """Ours, then the peers that are here."""
    return [OURS, *(name for name, facts in result["peers"].items() if not facts["absent"])]


BOUNDS = ("compute", "memory")


def lines(result: Result, bound: str) -> list[tuple[str, ...]]:
    """The head and a line a row of a bound: name, speed of each participant, ratio to the best peer, share of limit."""
    names, cpu = participants(result), on_cpu(result)
    unit = _unit(cpu) if bound == "compute" else "GB/s, memory-bound"
    more = ["of plain"] if PLAIN in names else []
    found: list[tuple[str, ...]] = [(unit, *names, "ratio", *more, "of limit")]
    for row in result["rows"]:
        if row["bound"] == bound:
            share = row["participants"][OURS].get("share")
            cells = [_cell(row, name, cpu) for name in names] + [ratio(row["ratio"])]
            cells += [ratio(row.get("of_plain"))] if more else []
            found.append((row["name"], *cells, f"{share:.0%}" if share else "–"))
    return found


def _by_bound(result: Result) -> list[list[tuple[str, ...]]]:
    return [found for bound in BOUNDS if len(found := lines(result, bound)) > 1]


def line(row: Result, names: list[str], cpu: bool = False) -> str:
    """A row while the run goes on."""
    cells = "  ".join(f"{name} {_cell(row, name, cpu)}" for name in names)
    unit = " GB/s" if row["bound"] == "memory" else " GFLOP/s" if cpu else ""
    return f"{row['name']:<44}  {cells}{unit}  {ratio(row['ratio'])}"


def aligned(cells: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = [
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]) for r in cells
    ]
    return "\n".join([text[0], "  ".join("-" * width for width in widths), *text[1:]])


def table(result: Result) -> str:
    return "\n\n".join(map(aligned, _by_bound(result)))


def closing(result: Result) -> list[str]:
    """The figures that sum a run up, and what kept others out of it."""
    found, summary = [], result["summary"]
    if summary["geometric_mean"]:
        found.append(f"ours / best peer: {_ratios(summary)}")
    rest = summary.get("without_split_keys")
    if rest and rest["geometric_mean"]:
        found.append(f"of these, rows with blocks enough for all SMs, or few keys: {_ratios(rest)}")
    if summary.get("behind"):
        found.append(_behind(result["rows"], summary["behind"]))
    if of_plain := summary.get("of_plain"):
        found.append(f"ours / ours plain: {_ratios(of_plain)}")
    found += _memory(result["rows"])
    if result["limit"]["samples"]:
        found.append(limit(result["limit"], on_cpu(result)))
    if summary["ours_by_torch"]:
        found.append(f"{NOT_OURS} no kernel of ours, PyTorch computed: {', '.join(summary['ours_by_torch'])}")
    for row in result["rows"]:
        for name, facts in row["participants"].items():
            if facts["outcome"] == "wrong" or (name == OURS and facts["outcome"] != "ok"):
                found.append(f"{facts['outcome']}: {name} on {row['name']}: {facts.get('reason', '')}")
    return found + _eager(result["rows"]) + absent(result["peers"])


def _ratios(summary: Result) -> str:
    worst = summary["worst"]
    return (
        f"geometric mean {ratio(summary['geometric_mean'])} over {summary['compared']} rows, "
        f"ahead on {summary['ahead']}, worst {ratio(worst['ratio'])} ({worst['name']})"
    )


def _behind(rows: list[Result], names: list[str]) -> str:
    """The worst first; ^ where few rows have many keys."""
    by_name = {row["name"]: row for row in rows}
    found = []
    for name in names[:_MOST_BEHIND]:
        row = by_name[name]
        found.append(f"{name}{'^' if row.get('needs_split_keys') else ''} {ratio(row['ratio'])} ({row['best_peer']})")
    more = f", and {len(names) - _MOST_BEHIND} more" if len(names) > _MOST_BEHIND else ""
    mark = "; ^ few blocks of rows on many keys" if any("^" in text for text in found) else ""
    return f"behind: {', '.join(found)}{more}{mark}"


def _memory(rows: list[Result]) -> list[str]:
    """What a step takes beside its inputs, of the longest rows."""
    found: list[str] = []
    for row in sorted(rows, key=lambda row: -row["length"]):
        taken = {name: facts["peak_bytes"] for name, facts in row["participants"].items() if facts.get("peak_bytes")}
        if len(found) < _MOST_MEMORY and OURS in taken:
            sizes = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in taken.items())
            found.append(f"peak memory of a step, MB: {row['name']}: {sizes}")
    return found


def limit(found: Result, cpu: bool = False) -> str:
    """The machine's own rates in the course of the run."""
    product = ", ".join(_flops(sample["tflops"], cpu) for sample in found["samples"])
    copies = ", ".join(f"{sample['gbps']:.0f}" for sample in found["samples"] if "gbps" in sample)
    reads = ", ".join(f"{sample['read_gbps']:.0f}" for sample in found["samples"] if "read_gbps" in sample)
    more = f"; torch.sum reads {reads} GB/s" if reads else ""
    return f"limit: {found['what']}, {product} {_unit(cpu)}; copies, {copies} GB/s{more}; in the course of the run"


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


def markdown_table(cells: Sequence[tuple[str, ...]], numbers: bool = True) -> str:
    """The head and its rows; all but the first column are numbers, or words."""
    rule = ("---", *(("---:" if numbers else "---") for _ in cells[0][1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


def markdown(result: Result) -> str:
    """Figures to be put into a document, with the command that made them."""
    names, tables = participants(result), []
    for cells in _by_bound(result):
        head = (cells[0][0], *(_label(name) for name in names), *cells[0][1 + len(names) :])
        tables += [markdown_table([head, *(_bold(row, len(names)) for row in cells[1:])]), ""]
    facts = ", ".join(f"{name} {value}" for name, value in result["environment"].items())
    extra = closing(result) + (host(result) if result["host"] else [])
    notes = [f"- {text}" for text in extra]
    op = "" if result.get("op", "forward") == "forward" else f"{result['op']}; "
    return "\n".join([f"{result['device']}; {op}`{result['command']}`", "", *tables, *notes, "", f"{facts}", ""])


def _bold(row: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The fastest of a row stands out."""

    def value(text: str) -> float:
        return float(text.rstrip(NOT_OURS).split(" ")[0]) if text[0].isdigit() else 0.0

    best = max(map(value, row[1 : 1 + count]))
    cells = [f"**{c}**" if value(c) == best > 0 else c.replace(NOT_OURS, "\\" + NOT_OURS) for c in row[1 : 1 + count]]
    return (row[0], *cells, *row[1 + count :])


_COLUMNS = (
    "outcome",
    "seconds",
    "spread",
    "samples",
    "tflops",
    "gbps",
    "share",
    "peak_bytes",
    "error",
    "error_over_bound",
    "verified",
)


def as_csv(result: Result) -> str:
    """A line a row and participant."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "key", "flops", "bytes", "bound", "participant", *_COLUMNS, "ratio", "reason"])
    for row in result["rows"]:
        for name, facts in row["participants"].items():
            values = [facts.get(column, "") for column in _COLUMNS]
            writer.writerow(
                [row["name"], row["key"], row["flops"], row["bytes"], row["bound"], name, *values,
                 row["ratio"] if name == OURS else "", facts.get("reason", "")]
            )  # fmt: skip
    return text.getvalue()
