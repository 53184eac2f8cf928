"""Lines of trials.jsonl: what became of a candidate, written down and read back."""

from __future__ import annotations

import math
from typing import Any

from fagen.codegen.spec import KernelSpec
from fagen.db.record import now
from fagen.families import Family
from fagen.ops.base import Problem
from fagen.target import Target
from fagen.timing.timer import Timing
from fagen.tuner.final_round import Known, source
from fagen.tuner.messages import Result


def row_of(item: KernelSpec, result: Result, host: str = "") -> dict[str, Any]:
    """`host`: who measured it, where several processes share a study."""
    timing = result.timing
    row = {
        "problem": item.problem.key,
        "family": item.family.name,
        "config": dict(item.config),
        "outcome": result.outcome,
        "reason": result.reason,
        "seconds": timing.median if timing else None,
        "spread": timing.spread if timing else None,
        "samples": timing.samples if timing else 0,
        "measure_seconds": round(result.took, 4),
        "error": result.error if math.isfinite(result.error) else None,
        "facts": result.artifact.facts if result.artifact else {},
        "device": result.state,
        "remeasured": result.remeasured,
        "source_hash": result.artifact.source_hash if result.artifact else "",
        "date": now(),
    }
    return row | ({"host": host} if host else {})


def known_of(row: dict[str, Any], family: Family, problem: Problem, target: Target) -> Known:
    item = KernelSpec(family, problem, target, family.config(row["config"]))
    timing = Timing(row["seconds"], row["spread"], row["samples"]) if row["outcome"] == "ok" else None
    return Known(item, row["outcome"], timing, row["error"], row["reason"], source(row))
