"""What the page shows, as plain data (`fagen report --json`): of the run, and of each of its problems."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from fagen import families
from fagen.errors import FagenError
from fagen.ops.attention.problem import Problem
from fagen.report import knobs, limits, load
from fagen.report.load import Row
from fagen.target import Target

FORMAT = 1
FEW = 3  # samples: what the clock takes of a candidate that fell behind
MOST_REASONS = 12
_OTHER_TIMES = re.compile(r"(\w+)_seconds")  # of a winner's row: default_seconds, torch_seconds, fa3_seconds, ...
_NAMES = {"torch": "PyTorch", "sdpa": "PyTorch", "cudnn": "cuDNN", "fa2": "FlashAttention 2", "fa3": "FlashAttention 3",
          "fa4": "FlashAttention 4", "flex": "FlexAttention", "flashinfer": "FlashInfer"}  # fmt: skip


def of_run(path: Path) -> Row:
    meta, rows, winners = load.read(path)
    asked = [made for made in map(load.problem_of, meta.get("problems") or []) if made]
    won = {load.key_of(row.get("problem")): row for row in winners if row.get("problem")}  # the last word counts
    tried = load.by_problem([*(problem.key for problem in asked), *won], rows, load.moment(meta.get("date")))
    known = {problem.key: problem for problem in asked}
    machine, target = limits.of_machine(meta), load.mapping(meta.get("target"))
    problems = [
        of_problem(known.get(key) or load.problem_of(key), key, own, won.get(key), machine, target)
        for key, own in tried.items()
    ]
    times = [row["when"] for own in tried.values() for row in own if row["when"]]
    begun = load.moment(meta.get("date")) or min(times, default=None)
    return {
        "format": FORMAT,
        "run": path.name if path.is_dir() else path.stem,
        "state": _state(problems, meta, winners),
        "date": meta.get("date"),
        "begun": begun,
        "ended": max(times, default=None),
        "seconds": sum(problem["seconds"] or 0.0 for problem in problems),
        "pauses": [row["pause"] for own in tried.values() for row in own if row["pause"]],
        "seed": meta.get("seed"),
        "fingerprint": meta.get("fingerprint"),
        "target": target,
        "environment": load.mapping(meta.get("environment")),
        "machine": machine,
        "summary": summary(problems),
        "problems": problems,
    }


def _state(problems: list[Row], meta: Row, winners: list[Row]) -> str:
    if not any(problem["trials"] for problem in problems):
        return "empty"
    if not meta and not winners:
        return "candidates"  # a file of them: nothing says how the run ended
    if all(problem["complete"] for problem in problems):
        return "complete" if all(problem["winner"] for problem in problems) else "failed"
    return "unfinished"


def summary(problems: list[Row]) -> Row:
    outcomes: dict[str, int] = {}
    for problem in problems:
        for outcome, count in problem["outcomes"].items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count

    def mean(name: str) -> float | None:
        ratios = [problem[name] for problem in problems if problem[name]]
        return statistics.geometric_mean(ratios) if ratios else None

    return {
        "problems": len(problems),
        "won": sum(bool(problem["winner"]) for problem in problems),
        "tried": sum(outcomes.values()),
        "timed": sum(row["seconds"] is not None for problem in problems for row in problem["trials"]),
        "outcomes": outcomes,
        "over_default": mean("over_default"),
        "over_torch": mean("over_torch"),
        "throttled": sum(row["throttled"] for problem in problems for row in problem["trials"]),
    }


# ---- one problem ----------------------------------------------------------------------------------------------------


def of_problem(problem: Problem | None, key: str, trials: list[Row], row: Row | None, machine: Row, target: Row) -> Row:
    tuned, work = row or {}, limits.work(problem)
    seconds = load.duration(tuned.get("seconds"))
    winner = _winner(tuned, trials) if seconds else None
    default = _default(tuned, trials, problem, target)
    best = winner or _fastest(trials)
    times = compare(tuned, trials, winner, default)
    for entry in times:
        entry["tflops"], entry["gbs"] = limits.rates(work, entry["seconds"])
    by_name = {entry["name"]: entry["seconds"] for entry in times}
    clocks = [trial["t"] for trial in trials if trial["t"] is not None]
    found = {
        "key": key,
        "problem": problem.to_dict() if problem else None,
        "title": problem.static_key if problem else key,
        "size": problem.size_key if problem else "",
        "complete": bool(tuned.get("complete")),
        "seconds": clocks[-1] if clocks else None,
        "why": str(tuned.get("why") or ""),
        "torch_mode": str(tuned.get("torch_mode") or ""),
        "outcomes": _count(trial["outcome"] for trial in trials),
        "winner": winner,
        "best": best,
        "default": default,
        "times": times,
        "over_default": _ratio(by_name.get("default"), best),
        "over_torch": _ratio(by_name.get("PyTorch"), best),
        "funnel": funnel(trials),
        "reasons": reasons(trials),
        "given_up": sum(1 for trial in trials if trial["seconds"] and 0 < trial["samples"] <= FEW),
        "knobs": knobs.of_families(trials),
        "device": device(trials),
        "work": work,
        "roof": limits.roof(machine, work["intensity"]) if work else None,
        "bound": limits.bound_by(machine, work["intensity"]) if work else "",
        "trials": trials,
    }
    found["of_roof"] = limits.share(limits.rates(work, best["seconds"] if best else None)[0], found["roof"])
    return found


def _count(words: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return counts


def _ratio(seconds: float | None, best: Row | None) -> float | None:
    return seconds / best["seconds"] if seconds and best else None


def _winner(tuned: Row, trials: list[Row]) -> Row:
    config, family = load.mapping(tuned.get("config")), str(tuned.get("family") or "")
    own = _trial(trials, config, family)
    return {
        "label": "winner", "family": family, "config": config, "seconds": load.duration(tuned.get("seconds")),
        "spread": load.number(tuned.get("spread")), "error": load.number(tuned.get("error")),
        "facts": own["facts"] if own else {}, "source_hash": own["source_hash"] if own else "", "from": "final round",
    }  # fmt: skip


def _fastest(trials: list[Row]) -> Row | None:
    timed = [trial for trial in trials if trial["seconds"]]
    if not timed:
        return None
    best = min(timed, key=lambda trial: trial["seconds"])
    names = ("family", "config", "seconds", "spread", "error", "facts", "source_hash")
    return {"label": "fastest so far", **{name: best[name] for name in names}, "from": "search"}


def _default(tuned: Row, trials: list[Row], problem: Problem | None, target: Row) -> Row:
    """The default's config: as the run kept it, else as its family has it now; empty where neither is known."""
    config = load.mapping(tuned.get("default_config"))
    names = [trial["family"] for trial in trials if trial["family"]]
    if not config and problem and names:
        try:
            config = dict(families.get(names[0]).default(problem, Target.from_dict(target)))
        except (FagenError, TypeError):
            config = {}
    return config


def _trial(trials: list[Row], config: Row, family: str = "") -> Row | None:
    """The candidate of a config; the timed one if it was tried more than once."""
    own = [t for t in trials if t["config"] == config and (not family or t["family"] in ("", family))] if config else []
    return next((t for t in own if t["seconds"]), own[0] if own else None)


def compare(tuned: Row, trials: list[Row], winner: Row | None, default: Row) -> list[Row]:
    """The winner and all that it was timed against, fastest first.

    The final round keeps a spread for the winner alone; the others have that of the search, where they were in it.
    """
    found = []
    best = winner or _fastest(trials)
    if best:
        found.append(
            {"name": best["label"], "seconds": best["seconds"], "spread": best["spread"], "from": best["from"]}
        )
    peers = {**{m[1]: value for name, value in tuned.items() if (m := _OTHER_TIMES.fullmatch(name))},
             **load.mapping(tuned.get("peers"))}  # fmt: skip
    searched = _trial(trials, default)
    if "default" not in peers and not winner and searched:
        peers["default"] = searched["seconds"]
    for name, value in peers.items():
        kept = load.mapping(value)
        seconds = load.duration(kept.get("seconds") if kept else value)
        spread = load.number(kept.get("spread"))
        if spread is None and name == "default" and searched:
            spread = searched["spread"]
        if seconds:
            source = "final round" if winner else "search"
            found.append({"name": _NAMES.get(name, name), "seconds": seconds, "spread": spread, "from": source})
    return sorted(found, key=lambda entry: entry["seconds"])


# ---- where candidates end -------------------------------------------------------------------------------------------


def funnel(trials: list[Row]) -> list[Row]:
    """How many passed each gate, and what was lost at it."""
    left = list(trials)
    stages: list[Row] = [{"gate": "tried", "count": len(left), "lost": {}}]
    gates = {
        "legal": lambda trial: trial["outcome"] == "constraint",
        "compiled": lambda trial: (
            trial["outcome"] in ("compile", "spill") or (trial["outcome"] == "timeout" and not trial["built"])
        ),  # the compiler's
        "right": lambda trial: trial["outcome"] not in ("ok",),
        "timed": lambda trial: trial["seconds"] is None,
    }
    for gate, lost in gates.items():
        gone = [trial for trial in left if lost(trial)]
        left = [trial for trial in left if not lost(trial)]
        stages.append({"gate": gate, "count": len(left), "lost": _count(trial["outcome"] for trial in gone)})
    return stages


def reasons(trials: list[Row]) -> list[Row]:
    """What failed and why, the most frequent first; reasons that differ in their numbers alone are one."""
    found: dict[tuple[str, str], Row] = {}
    for trial in trials:
        if trial["outcome"] == "ok":
            continue
        first = next(iter(trial["reason"].splitlines()), "")
        short = first.partition(":")[0] if trial["outcome"] == "constraint" else re.sub(r"\d[\d.,e+-]*", "…", first)
        entry = found.setdefault(
            (trial["outcome"], short),
            {"outcome": trial["outcome"], "reason": short, "count": 0, "example": first, "config": trial["config"]},
        )
        entry["count"] += 1
    return sorted(found.values(), key=lambda entry: -entry["count"])


def device(trials: list[Row]) -> Row | None:
    """Clock, power and temperature while candidates were timed, where the run kept them."""
    rows = [trial for trial in trials if trial["device"]]
    if not rows:
        return None
    names = [name for name in dict.fromkeys(n for t in rows for n in t["device"]) if name != "throttle"]
    ranges = {}
    for name in names:
        values = [v for v in (load.number(trial["device"].get(name)) for trial in rows) if v is not None]
        if values:
            ranges[name] = {"least": min(values), "median": statistics.median(values), "most": max(values)}
    hot = [trial for trial in rows if trial["throttled"]]
    return {"samples": len(rows), "ranges": ranges, "throttled": len(hot),
            "why": _count(_words(trial["device"]["throttle"]) for trial in hot)}  # fmt: skip


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)
