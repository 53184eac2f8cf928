"""Runs and recorded spaces in other tuners' formats: T4, and the cache of Kernel Tuner."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fagen.db.export import metadata_text, result_row, results_text
from fagen.errors import UsageError

if TYPE_CHECKING:
    from fagen.tuner.recorded_space import Recorded


def t4_run(word: str) -> tuple[str, str]:
    """Every candidate of a tuning run, whatever became of it. The run is named as for `fagen report`."""
    from fagen.report import load

    run = load.find(word)
    meta, rows, _ = load.read(run)
    results = [_candidate(row) for row in rows if {"problem", "family", "config", "outcome"} <= row.keys()]
    if not results:
        raise UsageError(f"{run} holds no tuning run", "it has no candidates")
    target, where = load.mapping(meta.get("target")), load.mapping(meta.get("environment"))
    return results_text(results), metadata_text(
        [{"arch": str(target.get("arch", "")), **{k: str(v) for k, v in where.items()}}]
    )


def _candidate(row: dict[str, Any]) -> dict[str, Any]:
    """A line of trials.jsonl; what is strange in it is left out."""
    from fagen.report import load

    told = load.candidate(row)
    known = {name: value for name, value in told["facts"].items() if type(value) in (int, float, str)}
    compiled = load.number(known.pop("compile_seconds", None)) or 0.0
    about = {"problem": load.key_of(row["problem"]), "family": told["family"]}
    date = row.get("date")
    return result_row(
        {**about, **told["config"]}, told["outcome"], told["seconds"], told["spread"], told["error"],
        {**known, "outcome": told["outcome"], "reason": told["reason"]},
        date=date if isinstance(date, str) else "", compiled=compiled,
    )  # fmt: skip


# ---- Kernel Tuner ----------------------------------------------------------------------------------------------------


_FAILED = {"compile": "CompilationFailedConfig", "spill": "CompilationFailedConfig"}  # others failed while they ran


def kernel_tuner(space: Recorded) -> str:
    """The cache of a space: keyed by the knobs' values, times in ms."""
    knobs = [knob.name for knob in space.family.knobs]
    cache = {}
    for config, entry in space.entries.items():
        found: dict[str, Any] = dict(config)
        if entry.outcome == "ok" and entry.seconds is not None:
            found |= {"time": entry.seconds * 1e3, "times": [entry.seconds * 1e3]}
        else:
            found["__error__"] = _FAILED.get(entry.outcome, "RuntimeFailedConfig")
        spent = {"compile_time": entry.compile_seconds * 1e3, "benchmark_time": entry.measure_seconds * 1e3}
        found |= {**spent, "verification_time": 0.0, "strategy_time": 0.0, "framework_time": 0.0}
        cache[",".join(str(config[name]) for name in knobs)] = found
    p = space.problem
    return json.dumps(
        {
            "device_name": space.target.device, "kernel_name": space.family.name,
            "problem_size": [p.batch, p.heads, p.seqlen_q], "tune_params_keys": knobs,
            "tune_params": {
                knob.name: [c for c in knob.choices if any(config[knob.name] == c for config in space.entries)]
                for knob in space.family.knobs
            },
            "objective": "time", "cache": cache,
        },
        indent=1,
    )  # fmt: skip
