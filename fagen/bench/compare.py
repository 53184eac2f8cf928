"""A new result against an old one of the same device: which rows fell by more than the noise of both.

A ratio in one run is the better measure. TFLOP/s drift with the clocks, so there the drift of the machine's own rate
counts as noise as well.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fagen.bench import output
from fagen.bench.peers import OURS
from fagen.bench.run import FORMAT, compared
from fagen.errors import UsageError
from fagen.schema import shown

Result = dict[str, Any]
LEAST = 0.02  # two runs of one kernel on one machine seldom agree better
MOST = 0.5  # what fell further is told, however loud the machine was


def read(path: Path) -> Result:
    return output.read(path, FORMAT, "rows")


def require_same(old: Result, device: str, op: str = "forward") -> None:
    was = old.get("op", "forward")  # results of forward alone did not say so
    if was != op:
        raise UsageError("the old result is of another op", f"old {shown(was)}, here {op!r}")
    if old["device"] != device:
        raise UsageError("the old result is of another device", f"old {old['device']!r}, here {device!r}")


def regressions(new: Result, old: Result) -> tuple[list[Result], list[str]]:
    """What fell, row by row, and the names of rows that only one of the results has."""
    before = {row["name"]: row for row in old["rows"]}
    after = {row["name"]: row for row in new["rows"]}
    drifts = {"compute": _drift("tflops", new, old), "memory": _drift("gbps", new, old)}
    found = [
        fall
        for name, row in after.items()
        if name in before
        for fall in _falls(name, row, before[name], drifts[row.get("bound", "compute")])
    ]
    return found, sorted(set(before) ^ set(after))


def _falls(name: str, new: Result, old: Result, drift: float) -> list[Result]:
    ours_old, ours_new = old["participants"][OURS], new["participants"][OURS]
    if ours_old["outcome"] != "ok":
        return []
    if ours_new["outcome"] != "ok":
        return [{"row": name, "what": "outcome", "old": "ok", "new": ours_new["outcome"], "noise": 0.0}]
    found: list[Result] = []
    noise = _noise(ours_new, ours_old)
    _judge(found, name, "tflops", ours_old["tflops"], ours_new["tflops"], max(noise + drift, LEAST))
    both = {peer for peer in old["participants"] if "tflops" in old["participants"][peer]}
    both &= {peer for peer in new["participants"] if "tflops" in new["participants"][peer]}
    then, now = (compared(row["participants"], both) for row in (old, new))
    if then["ratio"] and now["ratio"]:
        peers = _noise(new["participants"][now["best_peer"]], old["participants"][then["best_peer"]])
        _judge(found, name, "ratio", then["ratio"], now["ratio"], max(math.hypot(noise, peers), LEAST))
    return found


def _judge(found: list[Result], name: str, what: str, old: float, new: float, noise: float) -> None:
    if new < old * (1 - min(noise, MOST)):
        found.append({"row": name, "what": what, "old": old, "new": new, "noise": noise})


def _noise(*facts: Result) -> float:
    """Two standard errors of the difference, as a share."""
    return 2 * math.hypot(*(f["uncertainty"] / f["seconds"] for f in facts))


def _drift(rate: str, *results: Result) -> float:
    """How far apart a rate of the machine lies, over both runs."""
    rates = [sample[rate] for result in results for sample in result["limit"]["samples"] if rate in sample]
    return 1 - min(rates) / max(rates) if rates else 0.0


def words(falls: list[Result], lonely: list[str]) -> list[str]:
    found = [] if falls else ["no row fell by more than the noise"]
    for fall in falls:
        old, new = (f"{v:.3g}" if isinstance(v, float) else v for v in (fall["old"], fall["new"]))
        found.append(f"slower: {fall['row']}: {fall['what']} {old} -> {new} (noise {fall['noise']:.1%})")
    if lonely:
        found.append(f"{len(lonely)} rows are in one result alone, and not compared")
    return found
