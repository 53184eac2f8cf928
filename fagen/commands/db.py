"""fagen db: the tuned winners."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fagen import cliutil
from fagen.errors import DatabaseError, UsageError

FORMATS = {
    "json": "every field of every record",
    "csv": "a line a record: where, problem, config, times",
    "t4": "the open format of autotuning results (a measured configuration each, times in ms)",
}
# our outcomes in the six words of T4
_INVALIDITY = {
    "ok": "correct", "constraint": "constraints", "compile": "compile", "spill": "compile", "wrong": "correctness",
    "crash": "runtime", "timeout": "timeout",
}  # fmt: skip
_EXAMPLES = """examples:
  fagen db list
  fagen db show causal --json
  fagen db why --dtype bf16 --head-dim 128 --mask causal --seqlen 3k --heads 32
  fagen db merge theirs/tuning_db --policy faster
  fagen db export --format csv --out winners.csv
  fagen db export --format t4 --run RUN
  fagen db validate
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    about = "The tuned winners: those that ship, and your own above them."
    style = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("db", description=about, epilog=_EXAMPLES, formatter_class=style)
    verbs = parser.add_subparsers(dest="db_verb", metavar="VERB", required=True)

    def verb(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return cliutil.add_verb(verbs, name, text, f"example:\n  fagen db {example}")

    verb("list", "one line a winner", "list")
    show = verb("show", "everything about winners whose key contains KEY", "show d128/causal")
    show.add_argument("key", metavar="KEY", help="a problem's key or a part of it")
    why = verb("why", "which record a problem is served by, and why not by others", "why --head-dim 128 --seqlen 3k")
    cliutil.add_problem_flags(why)
    cliutil.add_target_flag(why)
    merge = verb("merge", "take others' winners into your own", "merge theirs/tuning_db --policy faster")
    merge.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="database files, or folders of them")
    merge.add_argument(
        "--policy", choices=("newer", "faster", "keep"), default="newer", help="who stays (default: newer)"
    )
    merge.add_argument("--out", type=Path, metavar="DIR", help="folder to merge into (default: the user's own)")
    export = verb("export", "winners for other programs", "export --format csv --out winners.csv")
    export.add_argument("--format", choices=tuple(FORMATS), default="json", help="default: json")
    export.add_argument("--run", type=Path, metavar="RUN", help="export the candidates of a tuning run instead (t4)")
    export.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: stdout)")
    validate = verb("validate", "check database files", "validate tuning_db")
    validate.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="files or folders (default: all in use)")


def run(args: argparse.Namespace) -> int:
    verbs = {"list": _list, "show": _show, "why": _why, "merge": _merge, "export": _export, "validate": _validate}
    return verbs[args.db_verb](args)


def _load() -> Any:
    from fagen.db import Database

    database = Database.load()
    for warning in database.warnings:
        cliutil.say(f"warning: {warning}")
    return database


def _full(record: Any) -> dict[str, Any]:
    return {"arch": record.arch, "device": record.device, "key": record.key, **record.to_dict()}


def _where(database: Any, record: Any) -> str:
    from fagen import env

    origin = database.origin(record)
    return "yours" if origin is not None and origin.is_relative_to(env.user_db_dir()) else "shipped"


def _sorted(records: Iterable[Any]) -> list[Any]:
    return sorted(records, key=lambda r: (r.arch, r.device, r.key))


def _list(args: argparse.Namespace) -> int:
    database = _load()
    records = _sorted(database.records)
    if args.json:
        cliutil.emit_json([{**_full(r), "origin": str(database.origin(r))} for r in records])
        return 0
    for r in records:
        gain = f"{r.speedup:.2f}x" if r.speedup else "-"
        cliutil.say(f"{r.arch:<7}{r.device:<18} {r.seconds * 1e3:9.3f} ms {gain:>6}  {_where(database, r):<8}{r.key}")
    cliutil.say(f"{len(records)} winners" + ("" if records else "; fagen tune makes some"))
    return 0


def _show(args: argparse.Namespace) -> int:
    database = _load()
    found = [r for r in _sorted(database.records) if args.key in r.key]
    if args.json:
        cliutil.emit_json([_full(r) for r in found])
    for r in [] if args.json else found:
        cliutil.say(f"{r.key}  on {r.arch} ({r.device})")
        cliutil.say(f"  file     {database.origin(r)}")
        cliutil.say(f"  config   {r.family}: {' '.join(f'{k}={v}' for k, v in r.config.items())}")
        gain = f", {r.speedup:.2f}x the default ({r.default_seconds * 1e3:.4g} ms)" if r.speedup else ""
        cliutil.say(f"  time     {r.seconds * 1e3:.4g} ms +- {r.spread / r.seconds:.1%}{gain}")
        cliutil.say(f"  error    {r.error:.2g}, source {r.source_hash}, {r.trials} candidates, {r.date}")
        cliutil.say(f"  measured {', '.join(f'{k} {v}' for k, v in sorted(r.environment.items()))}")
    if not found:
        cliutil.say(f"no winner's key contains {args.key!r}; fagen db list shows all")
    return 0 if found else 1


def _why(args: argparse.Namespace) -> int:
    from fagen import dispatch

    target = cliutil.target_from(args.target)
    problem = cliutil.one_problem(args, target)
    database = _load()
    choice = dispatch.choose(problem, target)
    records = [(r, provenance) for r, provenance in database.candidates(problem, target)][:5]
    if args.json:
        rows = [{"provenance": provenance, **_full(record)} for record, provenance in records]
        cliutil.emit_json({"key": problem.key, "target": str(target), **choice.to_dict(), "records": rows})
        return 0
    cliutil.say(f"{problem.key} on {target}")
    served = f"{choice.family.name}: {choice.config}" if choice.family else "PyTorch"
    cliutil.say(f"  served by {served}")
    cliutil.say(f"  because   {choice.provenance}: {dispatch.PROVENANCES[choice.provenance]}")
    for reason in choice.reasons:
        cliutil.say(f"  {reason}")
    for record, provenance in records:
        cliutil.say(f"  {provenance:<8}{record.key}  {record.device}  {_where(database, record)}")
    if not records:
        cliutil.say(f"  no winner under {problem.static_key} on {target.arch}; fagen tune makes one")
    return 0


def _files(paths: list[Path]) -> list[Path]:
    from fagen import db

    found: list[Path] = []
    for path in paths:
        below = db.files(path) if path.is_dir() else [path]
        if not below or not path.exists():
            raise UsageError(f"{path} holds no database file", "expected FILE.json, or a folder with ARCH/DEVICE.json")
        found += below
    return found


def _merge(args: argparse.Namespace) -> int:
    from fagen import db

    records, wrong = [], []
    for path in _files(args.paths):
        good, bad = db.read_file(path)
        records += good
        wrong += bad
    for line in wrong:
        cliutil.say(f"warning: {line}")
    written = db.put(records, args.out, args.policy)
    if args.json:
        cliutil.emit_json({"read": len(records), "written": [str(p) for p in written], "skipped": wrong})
    else:
        cliutil.say(f"{len(records)} winners merged ({args.policy}) into {', '.join(map(str, written)) or 'nothing'}")
    return 0


def _validate(args: argparse.Namespace) -> int:
    from fagen import db

    paths = _files(args.paths) if args.paths else [f for folder in db.default_paths() for f in db.files(folder)]
    wrong: list[str] = []
    count = 0
    for path in paths:
        try:
            records, bad = db.read_file(path)
            bad += [f"{path}: {reason}" for r in records if (reason := _stale(r))]
        except DatabaseError as error:
            records, bad = [], [" ".join(str(error).splitlines())]
        count += len(records)
        wrong += bad
        if not args.json:
            cliutil.say(f"{'bad' if bad else 'ok '}  {path}  {len(records)} winners")
    if args.json:
        cliutil.emit_json({"files": [str(p) for p in paths], "records": count, "wrong": wrong})
    if wrong:
        more = f"and {len(wrong) - 1} more; --json lists them" if len(wrong) > 1 else ""
        raise DatabaseError("the database is not valid", wrong[0], more)
    return 0


def _stale(record: Any) -> str:
    """Why a record could not be used by this version, if it could not."""
    from fagen import families
    from fagen.errors import FagenError

    try:
        families.get(record.family).config(record.config)
    except FagenError as error:
        return f"record {record.key}: {error.what}"
    return ""


# ---- export ---------------------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    if args.run and args.format != "t4":
        raise UsageError("--run goes with --format t4", remedy="trials.jsonl in the run's folder is JSON already")
    if args.run:
        from fagen.tuner import journal

        text = _t4(_trials(list(journal.read_lines(args.run / journal.TRIALS))))
    else:
        records = _sorted(_load().records)
        if args.format == "t4":
            text = _t4([_t4_record(r) for r in records])
        else:
            text = json.dumps([_full(r) for r in records], indent=1) if args.format == "json" else _csv(records)
    if args.out:
        args.out.write_text(text + "\n")
        cliutil.say(f"written: {args.out}")
        if args.json:
            cliutil.emit_json({"written": str(args.out)})
    else:
        sys.stdout.write(text + "\n")
    return 0


def _csv(records: list[Any]) -> str:
    out = io.StringIO()
    names = ["arch", "device", "key", "family", "config", "seconds", "spread", "default_seconds", "error", "date"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        row = {**_full(record), "config": json.dumps(record.config, sort_keys=True)}
        writer.writerow([row[name] for name in names])
    return out.getvalue().rstrip("\n")


def _t4(results: list[dict[str, Any]]) -> str:
    return json.dumps({"schema_version": "1.0.0", "results": results}, indent=1)


def _t4_record(record: Any) -> dict[str, Any]:
    about = {"problem": record.key, "family": record.family, "arch": record.arch, "device": record.device}
    return _t4_result({**about, **record.config}, "ok", record.seconds, 0.0, record.date)


def _trials(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        _t4_result(
            {"problem": row["problem"], "family": row["family"], **row["config"]},
            row["outcome"],
            row["seconds"],
            row["facts"].get("compile_seconds", 0.0),
            row["date"],
        )
        for row in rows
    ]


def _t4_result(
    configuration: dict[str, Any], outcome: str, seconds: float | None, compiled: float, date: str
) -> dict[str, Any]:
    measured = [] if seconds is None else [seconds * 1e3]
    return {
        "timestamp": date,
        "configuration": configuration,
        "times": {
            # one reader wants the first name of the same time, one the second
            "compilation_time": compiled * 1e3, "compilation": compiled * 1e3, "benchmark": sum(measured),
            "runtimes": measured, "framework": 0.0, "search_algorithm": 0.0, "validation": 0.0,
        },
        "invalidity": _INVALIDITY[outcome],
        "correctness": 1 if outcome == "ok" else 0,
        "measurements": [{"name": "time", "value": value, "unit": "ms"} for value in measured],
        "objectives": ["time"],
    }  # fmt: skip
