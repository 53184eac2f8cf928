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
from typing import Any

from fagen.db.record import Record

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
        results.append(result_row({**about, **r.config}, "ok", r.seconds, r.spread, r.error, facts, date=r.date))
        where.append({"arch": r.arch, **r.environment})
    return results_text(results), metadata_text(where)


def results_text(results: list[dict[str, Any]]) -> str:
    return json.dumps({"schema_version": T4_VERSION, "results": results}, indent=1)


def result_row(
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


def metadata_text(where: Iterable[dict[str, str]]) -> str:
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


def t4_paths(out: Path) -> tuple[Path, Path]:
    """Where results and metadata go: both into a folder, or the second beside the file that was named."""
    if out.is_dir():
        return out / "results.json", out / "metadata.json"
    return out, out.with_name(f"{out.stem}-metadata.json")
