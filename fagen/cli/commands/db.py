"""fagen db: the tuned winners."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fagen.cli import arguments
from fagen.cli.commands import db_portfolio
from fagen.db.export import FORMATS, full
from fagen.errors import DatabaseError, UsageError
from fagen.notices import emit_json, say

_MOST_LINES = 40  # of a list that may be long; --json has all
_EXAMPLES = """examples:
  fagen db list
  fagen db show causal --json
  fagen db why --dtype bf16 --head-dim 128 --mask causal --seqlen 3k --heads 32
  fagen db merge theirs/tuning_db --policy faster --dry-run
  fagen db diff yours theirs/tuning_db
  fagen db export --format csv --out winners.csv
  fagen db export --format t4 --run RUN --out results.json
  fagen db export --format kernel_tuner --space benchmarks/spaces/h200_d64_causal.jsonl.xz --out cache.json
  fagen db validate
  fagen db prune --stale
  fagen db portfolio d128/causal --times RUN SPACE.jsonl.xz --within 1%
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    about = "The tuned winners: those that ship, and your own above them."
    style = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser("db", description=about, epilog=_EXAMPLES, formatter_class=style)
    verbs = parser.add_subparsers(dest="db_verb", metavar="VERB", required=True)

    def verb(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return arguments.add_verb(verbs, name, text, f"example:\n  fagen db {example}")

    verb("list", "one line a winner", "list")
    show = verb("show", "everything about winners whose key contains KEY", "show d128/causal")
    show.add_argument("key", metavar="KEY", help="a problem's key or a part of it")
    why = verb("why", "which record a problem is served by, and why not by others", "why --head-dim 128 --seqlen 3k")
    arguments.add_problem_flags(why)
    arguments.add_target_flag(why)
    _add_exchange(verb)
    db_portfolio.add(verb)
    validate = verb("validate", "check database files", "validate tuning_db")
    validate.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="files or folders (default: all in use)")
    validate.add_argument(
        "--strict", action="store_true", help="fail for winners whose kernel source has changed since, too"
    )
    prune = verb("prune", "remove winners that are of no use", "prune --stale")
    prune.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="files or folders (default: your own)")
    prune.add_argument("--stale", action="store_true", help="those whose kernel source has changed since, too")
    prune.add_argument("--yes", action="store_true", help="remove them; without it they are only listed")


def _add_exchange(verb: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    """The verbs that take others' files in, compare them, and hand winners out."""
    merge = verb("merge", "take others' winners into your own", "merge theirs/tuning_db --policy faster")
    merge.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="database files, or folders of them")
    merge.add_argument(
        "--policy", choices=("newer", "faster", "keep"), default="newer", help="who stays (default: newer)"
    )
    merge.add_argument("--out", type=Path, metavar="DIR", help="folder to merge into (default: the user's own)")
    merge.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    diff = verb("diff", "how two databases differ", "diff yours theirs/tuning_db")
    for name in "ab":
        diff.add_argument(name, metavar=name.upper(), help="a file, a folder, or one of: yours, shipped")
    export = verb("export", "winners for other programs", "export --format csv --out winners.csv")
    text = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    export.add_argument("--format", choices=tuple(FORMATS), default="json", help=f"{text} (default: json)")
    export.add_argument(
        "--run", metavar="RUN", help="export the candidates of a tuning run instead (t4): its name, folder or `latest`"
    )
    export.add_argument(
        "--space", type=Path, metavar="FILE", help="export a space that fagen tune --record wrote (kernel_tuner)"
    )
    export.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default: stdout); t4 writes its metadata beside it"
    )


def run(args: argparse.Namespace) -> int:
    verbs = {
        "list": _list, "show": _show, "why": _why, "merge": _merge, "diff": _diff, "export": _export,
        "validate": _validate, "prune": _prune, "portfolio": db_portfolio.run,
    }  # fmt: skip
    return verbs[args.db_verb](args)


def _load(paths: list[Path] | None = None) -> Any:
    from fagen.db.store import Database

    database = Database.load(paths)
    for warning in database.warnings:
        say(f"warning: {warning}")
    return database


def _where(database: Any, record: Any) -> str:
    from fagen.db import store

    return store.owner(database.origin(record))


def _sorted(records: Iterable[Any]) -> list[Any]:
    return sorted(records, key=lambda r: (r.arch, r.device, r.key))


def _list(args: argparse.Namespace) -> int:
    database = _load()
    records = _sorted(database.records)
    if args.json:
        emit_json([{**full(r), "origin": str(database.origin(r))} for r in records])
        return 0
    rows = [("arch", "device", "family", "time", "gain", "whose", "problem")] if records else []
    for r in records:
        gain = f"{r.speedup:.2f}x" if r.speedup else "-"
        time = f"{r.seconds * 1e3:.3f} ms"
        rows.append((r.arch, r.device, r.family, time, gain, _where(database, r), r.key))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            text.rjust(w) if i in (3, 4) else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(cells).rstrip())
    say(f"{len(records)} winners" + ("" if records else "; fagen tune makes some"))
    return 0


def _show(args: argparse.Namespace) -> int:
    from fagen.db import audit

    database = _load()
    found = [r for r in _sorted(database.records) if args.key in r.key]
    if args.json:
        emit_json([full(r) for r in found])
    for r in [] if args.json else found:
        say(f"{r.key}  on {r.arch} ({r.device})")
        say(f"  file     {database.origin(r)}")
        say(f"  config   {r.family}: {' '.join(f'{k}={v}' for k, v in r.config.items())}")
        gain = f", {r.speedup:.2f}x the default ({r.default_seconds * 1e3:.4g} ms)" if r.speedup else ""
        say(f"  time     {r.seconds * 1e3:.4g} ms +- {r.spread / r.seconds:.1%}{gain}")
        if r.torch_seconds:
            ratio = f"{r.torch_seconds / r.seconds:.2f}x the winner's time"
            say(f"  PyTorch  {r.torch_seconds * 1e3:.4g} ms, {ratio}")
        state, why = audit.state(r)
        say(f"  error    {r.error:.2g}, {r.trials} candidates, {r.date}")
        say(f"  source   {state}: {why or r.source_hash}")
        say(f"  measured {', '.join(f'{k} {v}' for k, v in sorted(r.environment.items()))}")
    if not found:
        say(f"no winner's key contains {args.key!r}; fagen db list shows all")
    return 0 if found else 1


def _why(args: argparse.Namespace) -> int:
    from fagen.dispatch import choose

    target = arguments.target_from(args.target)
    problem = arguments.one_problem(args, target)
    database = _load()
    choice = choose.choose(problem, target)
    records = [(r, provenance) for r, provenance in database.candidates(problem, target)][:5]
    if args.json:
        rows = [{"provenance": provenance, **full(record)} for record, provenance in records]
        emit_json({"key": problem.key, "target": str(target), **choice.to_dict(), "records": rows})
        return 0
    say(f"{problem.key} on {target}")
    served = f"{choice.spec.family.name}: {choice.spec.config}" if choice.spec else "PyTorch"
    say(f"  served by {served}")
    say(f"  because   {choice.provenance}: {choose.PROVENANCES[choice.provenance]}")
    if choice.trust:
        say(f"  source    {choice.trust.state}: {choice.trust.text}")
    for reason in choice.reasons:
        say(f"  {reason}")
    for record, provenance in records:
        say(f"  {provenance:<8}{record.key}  {record.device}  {_where(database, record)}")
    if not records:
        say(f"  no winner under {problem.static_key} on {target.arch}; fagen tune makes one")
    return 0


def _files(paths: list[Path]) -> list[Path]:
    from fagen.db import store

    found: list[Path] = []
    for path in paths:
        below = store.files(path) if os.path.isdir(path) else [path] if os.path.lexists(path) else []
        if not below:
            raise UsageError(f"{path} holds no database file", "expected FILE.json, or a folder with ARCH/DEVICE.json")
        found += below
    return found


def _read(paths: list[Path]) -> tuple[list[Any], list[str]]:
    """Records and what is wrong with others, told at once. Raises for a file of which nothing can be used."""
    from fagen.db import store

    records, wrong = [], []
    for path in _files(paths):
        good, bad = store.read_file(path)
        records += good
        wrong += bad
    for line in wrong:
        say(f"warning: {line}")
    return records, wrong


def _merge(args: argparse.Namespace) -> int:
    from fagen.db import merge

    records, wrong = _read(args.paths)
    done = merge.merge(records, args.out, args.policy, dry_run=True)  # what is refused is refused before any write
    if not args.dry_run:
        done = merge.merge(records, args.out, args.policy)
    counts = {action: done.count(action) for action in ("added", "replaced", "kept")}
    differences = done.differences()
    if args.json:
        rows = [
            {"action": d.action, "arch": d.new.arch, "device": d.new.device, "key": d.new.key, "family": d.new.family,
             "reason": d.reason}
            for d in done.decisions
        ]  # fmt: skip
        emit_json(
            {"read": len(records), "policy": args.policy, "dry_run": args.dry_run, **counts, "decisions": rows,
             "written": [str(p) for p in done.written], "skipped": wrong, "differences": differences}
        )  # fmt: skip
        return 0
    told = [d for d in done.decisions if d.reason not in ("", "the same record")]
    for d in told[:_MOST_LINES]:
        say(f"{d.action:<9}{d.new.key} ({d.new.family}): {d.reason}")
    if len(told) > _MOST_LINES:
        say(f"and {len(told) - _MOST_LINES} more; --json lists them")
    for text, count in differences.items():
        say(f"warning: {count} of the winners that met were measured under {text}: times may not compare")
    verb = "would be" if args.dry_run else "were"
    words = ", ".join(f"{count} {action}" for action, count in counts.items())
    into = ", ".join(map(str, done.written)) or "nothing is written" * args.dry_run or "nothing"
    say(f"of {len(records)} winners {verb} ({args.policy}): {words}; {into}")
    return 0


def _side(word: str) -> list[Any]:
    """The records of a file, of a folder, or of one of the two in use."""
    from fagen.db.store import default_paths

    if word in ("yours", "shipped") and not os.path.lexists(word):
        return _load([default_paths()[word == "yours"]]).records
    return _read([Path(word)])[0]


def _diff(args: argparse.Namespace) -> int:
    from fagen.db import merge

    a, b = _side(args.a), _side(args.b)
    rows = merge.diff(a, b)
    if args.json:
        emit_json({"a": len(a), "b": len(b), "differences": rows})
        return 0
    for row in rows:
        text = ""
        if row["what"] in ("config", "time"):
            beyond = "" if row["beyond_noise"] else ", within the noise"
            text = f"  A takes {row['ratio']:.3f} of B's time{beyond}"
            text += "".join(f"; {name} {one} and {other}" for name, (one, other) in row["changed"].items())
        say(f"{row['what']:<8}{row['arch']:<7}{row['key']} ({row['family']}){text}")
    counts = ", ".join(
        f"{sum(r['what'] == what for r in rows)} {what}" for what in ("only a", "only b", "config", "time")
    )
    say(f"A has {len(a)} winners, B {len(b)}: {counts}")
    return 0


def _validate(args: argparse.Namespace) -> int:
    from fagen.db import audit, store

    paths = _files(args.paths) if args.paths else [f for folder in store.default_paths() for f in store.files(folder)]
    found, count = [], 0
    for path in paths:
        records, here = audit.check_file(path)
        count += len(records)
        found += here
        bad = [finding for finding in here if args.strict or finding.kind not in audit.HARMLESS]
        if not args.json:
            stale = sum(finding.kind in audit.HARMLESS for finding in here)
            note = f", {stale} of another kernel source" if stale else ""
            say(f"{'bad' if bad else 'ok '}  {path}  {len(records)} winners{note}")
    wrong = [f for f in found if args.strict or f.kind not in audit.HARMLESS]
    if args.json:
        rows = [finding.to_dict() for finding in found]
        texts = [_finding(finding) for finding in wrong]
        emit_json({"files": [str(p) for p in paths], "records": count, "findings": rows, "wrong": texts})
    else:
        for finding in found[:_MOST_LINES]:
            say(f"{finding.kind:<11}{_finding(finding)}")
    if wrong:
        more = f"and {len(wrong) - 1} more; --json lists them" if len(wrong) > 1 else ""
        raise DatabaseError("the database is not valid", _finding(wrong[0]), more)
    return 0


def _finding(finding: Any) -> str:
    about = f"record {finding.key} ({finding.family}): " if finding.key else ""
    return f"{finding.path}: {about}{finding.text}"


def _prune(args: argparse.Namespace) -> int:
    from fagen.db import audit, store
    from fagen.db.merge import remove

    kinds = ("illegal", "duplicate", *(("stale",) if args.stale else ()))
    paths = _files(args.paths) if args.paths else store.files(store.default_paths()[1])
    doomed: dict[Path, list[Any]] = {}
    for path in paths:
        records, found = audit.check_file(path)
        if not records and found:
            raise DatabaseError(f"{path} cannot be pruned", found[0].text, "nothing was removed")
        doomed[path] = [finding for finding in found if finding.kind in kinds]
    removed = 0
    for path, findings in doomed.items():
        for finding in findings:
            say(f"{finding.kind:<11}{_finding(finding)}")
        if args.yes and findings:
            removed += remove(path, lambda record: audit.state(record)[0] in kinds)
    total = sum(map(len, doomed.values()))
    if args.json:
        rows = [finding.to_dict() for findings in doomed.values() for finding in findings]
        emit_json({"files": [str(p) for p in paths], "found": rows, "removed": removed})
    if args.yes:
        say(f"{removed} winners removed")
    else:
        say(f"{total} winners would be removed" + ("; --yes removes them" if total else ""))
    return 0


# ---- export ---------------------------------------------------------------------------------------------------------


def _one_space(path: Path) -> Any:
    from fagen.tuner import recorded_space

    spaces = recorded_space.read(path)
    if len(spaces) > 1:
        raise UsageError(f"{path} holds {len(spaces)} spaces", "a cache of Kernel Tuner holds one")
    return spaces[0]


def _export(args: argparse.Namespace) -> int:
    from fagen.db.export import as_csv, as_json, t4_paths, t4_winners
    from fagen.report.export import kernel_tuner, t4_run

    if args.run and args.format != "t4":
        raise UsageError("--run goes with --format t4", remedy="trials.jsonl in the run's folder is JSON already")
    if bool(args.space) != (args.format == "kernel_tuner"):
        raise UsageError("--space goes with --format kernel_tuner, and no other with it")
    records = [] if args.run or args.space else _sorted(_load().records)
    metadata = ""
    if args.space:
        text = kernel_tuner(_one_space(args.space))
    elif args.format == "t4":
        text, metadata = t4_run(args.run) if args.run else t4_winners(records)
    else:
        text = as_json(records) if args.format == "json" else as_csv(records)
    if not args.out:
        sys.stdout.write(text + "\n")
        return 0
    out, beside = t4_paths(args.out) if metadata else (args.out, None)
    try:
        out.write_text(text + "\n", encoding="utf-8")
        if beside is not None:
            beside.write_text(metadata + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out} cannot be written", str(error)) from error
    say(f"written: {out}" + (f" and {beside}" if beside else ""))
    if args.json:
        emit_json({"written": str(out), "metadata": str(beside) if beside else None})
    return 0
