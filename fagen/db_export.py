"""Winners and runs for other programs: JSON, CSV, and T4, the open format of autotuning results.

T4 keeps every evaluated configuration in one file and the machine in a second one. Its schema names the time of a
compilation `compilation_time`, its best known writer `compilation`; both are written.
"""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.db import Record
from fagen.errors import UsageError

if TYPE_CHECKING:
    from fagen.tuner.record import Recorded

FORMATS = {
    "json": "every field of every record",
    "csv": "a line a record: where, problem, config, times",
    "t4": "the open format of autotuning results (a measured configuration each, times in ms)",
    "kernel_tuner": "a recorded space (--space) as the cache of Kernel Tuner, which its simulation mode replays",
}
T4_VERSION = "1.0.0"
# how a candidate ended, in the six words of T4; what it does not know ended while it ran
_INVALIDITY = {
    "ok": "correct", "constraint": "constraints", "compile": "compile", "spill": "compile", "wrong": "correctness",
    "crash": "runtime", "timeout": "timeout",
}  # fmt: skip


def full(record: Record) -> dict[str, Any]:
    return {"arch": record.arch, "device": record.device, "key": record.key, **record.to_dict()}


def as_json(records: Iterable[Record]) -> str:
    return json.dumps([full(record) for record in records], indent=1)


def as_csv(records: Iterable[Record]) -> str:
    out = io.StringIO()
    names = ["arch", "device", "key", "family", "config", "seconds", "spread", "default_seconds", "torch_seconds"]
    names += ["error", "trials", "source_hash", "date"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        row = {**full(record), "config": json.dumps(record.config, sort_keys=True)}
        writer.writerow([row[name] for name in names])
    return out.getvalue().rstrip("\n")


# ---- T4 -------------------------------------------------------------------------------------------------------------


def t4_winners(records: Iterable[Record]) -> tuple[str, str]:
    """(results, metadata)."""
    results, where = [], []
    for r in records:
        about = {"problem": r.key, "family": r.family, "arch": r.arch, "device": r.device}
        facts = {"trials": r.trials, "source_hash": r.source_hash, "torch_seconds": r.torch_seconds}
        results.append(_result({**about, **r.config}, "ok", r.seconds, r.spread, r.error, facts, date=r.date))
        where.append({"arch": r.arch, **r.environment})
    return _results(results), _metadata(where)


def t4_run(word: str) -> tuple[str, str]:
    """Every candidate of a tuning run, whatever became of it. The run is named as for `fagen report`."""
    from fagen.report import load

    run = load.find(word)
    meta, rows, _ = load.read(run)
    results = [_candidate(row) for row in rows if {"problem", "family", "config", "outcome"} <= row.keys()]
    if not results:
        raise UsageError(f"{run} holds no tuning run", "it has no candidates")
    target, where = load.mapping(meta.get("target")), load.mapping(meta.get("environment"))
    return _results(results), _metadata(
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
    return _result(
        {**about, **told["config"]}, told["outcome"], told["seconds"], told["spread"], told["error"],
        {**known, "outcome": told["outcome"], "reason": told["reason"]},
        date=date if isinstance(date, str) else "", compiled=compiled,
    )  # fmt: skip


def _results(results: list[dict[str, Any]]) -> str:
    return json.dumps({"schema_version": T4_VERSION, "results": results}, indent=1)


def _result(
    configuration: dict[str, Any],
    outcome: str,
    seconds: float | None,
    spread: float | None,
    error: float | None,
    facts: dict[str, Any],
    *,
    date: str = "",
    compiled: float = 0.0,
) -> dict[str, Any]:
    good = outcome == "ok"
    measured = [] if seconds is None else [seconds * 1e3]
    values = [("time", value, "ms") for value in measured]
    values += [("spread", spread * 1e3, "ms")] if measured and spread is not None else []
    values += [("error", error, "")] if error is not None else []
    values += [(name, value, "") for name, value in facts.items()]
    return {
        "timestamp": date,
        "configuration": configuration,
        "times": {
            "compilation_time": compiled * 1e3, "compilation": compiled * 1e3, "benchmark": sum(measured),
            "runtimes": measured, "framework": 0.0, "search_algorithm": 0.0, "validation": 0.0,
        },
        "invalidity": _INVALIDITY.get(outcome, "runtime"),
        "correctness": 1 if good else 0,
        "measurements": [{"name": name, "value": value, "unit": unit} for name, value, unit in values],
        "objectives": ["time"],
    }  # fmt: skip


def _metadata(where: Iterable[dict[str, str]]) -> str:
    """The machines on which it was measured, as the records tell; `requirements` are those of the first."""
    machines = list({json.dumps(facts, sort_keys=True): facts for facts in where}.values())
    first = machines[0] if machines else {}
    packages = [f"{name}=={first[name]}" for name in ("fagen", "torch") if first.get(name)]
    system = f"{platform.system()} (of the export)"
    return json.dumps(
        {
            "schema_version": T4_VERSION,
            "metadata": {
                "hardware": {"operating_system": system, "hardware_description": machines},
                "environment": {"device_query": {"fagen": machines}, "requirements": packages},
            },
        },
        indent=1,
    )


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


def t4_paths(out: Path) -> tuple[Path, Path]:
    """Where results and metadata go: both into a folder, or the second beside the file that was named."""
    if out.is_dir():
        return out / "results.json", out / "metadata.json"
    return out, out.with_name(f"{out.stem}-metadata.json")
