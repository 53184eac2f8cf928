"""fagen tune: find the fastest kernel for these problems on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path

from fagen import schema
from fagen.cli import arguments, presets
from fagen.errors import MissingTool, UsageError
from fagen.families.space import Fixed
from fagen.notices import emit_json, say
from fagen.ops.attention import parse
from fagen.ops.attention.problem import Problem
from fagen.target import Target
from fagen.tuner.search import SAMPLERS

_EXAMPLES = """examples:
  fagen tune                                       a small suite for this machine's GPU, else its CPU, in 5 minutes
  fagen tune --target cpu --dtype fp32 --head-dim 64 --mask causal --seqlen 1k --heads 8 --trials 30
  fagen tune --dtype bf16 --head-dim 64,128 --mask causal --seqlen 1k,4k --batch 4 --heads 32 --kv-heads 8 --budget 10m
  fagen tune --problems suite.toml --budget 1h --out tuning_db
  fagen tune --preset llama3-8b,gemma3-4b --seqlen 4k --budget 10m     the layers of these models
  fagen tune --problems suite.toml --resume        go on with the latest run of these problems
  fagen tune --problems suite.toml --gpus all --storage postgresql://me@host/fagen   on each host that takes part
  fagen tune --head-dim 128 --mask none --dry-run  how large the space is, and what each constraint removes
  fagen tune --head-dim 128 --mask none --fix stages=2 --record space.jsonl.xz     every legal config, as data
  fagen tune --simulate space.jsonl.xz --sampler guided,tpe,random                 how well the search does on it
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    about = "Build, verify and time kernels for each problem, and remember the fastest."
    parser = arguments.add_verb(subparsers, "tune", about, _EXAMPLES)
    arguments.add_problem_flags(parser)
    arguments.add_target_flag(parser)
    search = parser.add_argument_group("search")
    search.add_argument(
        "--budget", metavar="TIME", help="wall time of the whole run: seconds, or 90s, 10m, 1h (default: 5m)"
    )
    search.add_argument("--trials", type=arguments.count, metavar="N", help="candidates for each problem, at most")
    search.add_argument("--seed", type=int, default=0, metavar="N", help="of the search and of the inputs (default: 0)")
    search.add_argument(
        "--workers", type=arguments.count, metavar="N", help="compilers at a time (default: cores and memory)"
    )
    search.add_argument(
        "--gpus", metavar="all|0,1,...", help="measure on these GPUs of one kind at once (default: the target's alone)"
    )
    search.add_argument(
        "--storage", metavar="URL", help="share studies through a database: postgresql://user:password@host/name"
    )
    search.add_argument("--family", metavar="NAME", help="search this family alone (default: all that can serve)")
    search.add_argument(
        "--compile-timeout",
        metavar="TIME",
        default="120s",
        help="for a candidate, longer on a busy machine (default: 120s)",
    )
    search.add_argument(
        "--run-timeout",
        metavar="TIME",
        default="10s",
        help="beside its estimate, longer on a busy machine (default: 10s)",
    )
    search.add_argument(
        "--resume", nargs="?", const="latest", metavar="RUN", help="go on with a run (default: the latest)"
    )
    search.add_argument(
        "--out", type=Path, metavar="DIR", help="database folder for the winners (default: the user's own)"
    )
    search.add_argument(
        "--fix", action="append", default=[], metavar="KNOB=V[,V]", help="restrict a knob to these values; repeatable"
    )
    search.add_argument(
        "--record", type=Path, metavar="FILE", help="measure every legal config in full, and write them all to FILE"
    )
    search.add_argument(
        "--sampler", metavar="LIST", help=f"what picks candidates: {', '.join(SAMPLERS)} (default: {SAMPLERS[0]})"
    )
    search.add_argument(
        "--cold", action="store_true", help="begin without the database's winners and the family's guesses"
    )
    search.add_argument("--list-presets", action="store_true", help="show the models that --preset knows")
    search.add_argument("--dry-run", action="store_true", help="show the search spaces and run nothing")
    replay = parser.add_argument_group("simulation", "no kernel is built or run, so that it needs no GPU")
    replay.add_argument(
        "--simulate", nargs="+", type=Path, metavar="FILE", help="replay the search on spaces that --record wrote"
    )
    replay.add_argument("--seeds", type=arguments.count, default=20, metavar="N", help="searches of each (default: 20)")
    replay.add_argument("--expect", metavar="E", help="fail when missed: within=2%%,trials=15%%, median of the seeds")
    replay.add_argument("--jobs", type=arguments.count, default=1, metavar="N", help="processes (default: 1)")


def samplers(words: str | None, default: tuple[str, ...]) -> list[str]:
    found = [word.strip() for word in words.split(",")] if words else list(default)
    for word in found:
        if word not in SAMPLERS:
            raise UsageError(f"sampler {word!r} is unknown", f"known: {', '.join(SAMPLERS)}")
    return list(dict.fromkeys(found))


def run(args: argparse.Namespace) -> int:
    from fagen.ops.attention import suite

    begun = time.monotonic()  # the budget pays for the import of torch

    if args.list_presets:
        return _list_presets(args.json)
    if args.simulate:
        return _simulate(args)
    if args.expect:
        raise UsageError("--expect is of a simulation", remedy="add --simulate FILE")
    chosen = gpus(args.gpus, args.target) if args.gpus else ()
    name = f"gpu:{chosen[0]}" if chosen else args.target
    target = arguments.target_from(name)
    problems = arguments.problems_from(args, target) or suite.default(target)
    fixed = _fixed(args, problems, target)
    if args.dry_run:
        return _dry_run(problems, target, args.family, fixed, args.json)
    devices = chosen or (int((name or "").partition(":")[2] or 0),)
    target = _present(name, target)
    arguments.require_memory(problems, target, devices[0])
    return _tune(problems, target, devices, fixed, begun, args)


def resuming(words: list[str], run: Path) -> str:
    """The command that was typed, so that it goes on with its run. A storage's password is not repeated."""
    kept: list[str] = []
    before = ""
    for word in words:
        flag, equals, _ = word.partition("=")
        old = flag == "--resume" or (before == "--resume" and not word.startswith("-"))
        if before == "--storage":
            word = "URL"
        elif flag == "--storage" and equals:
            word = "--storage=URL"
        kept += [] if old else [word]
        before = flag if not equals else ""
    return shlex.join(["fagen", *kept, "--resume", str(run)])


def _fixed(args: argparse.Namespace, problems: list[Problem], target: Target) -> Fixed:
    """The restriction of --fix, which must name knobs of families that are searched."""
    from fagen import families
    from fagen.families.space import restriction

    able = {f.name: f for problem in problems for f in families.searched(problem, target)[0]}
    named = [families.get(args.family)] if args.family else []
    return restriction(args.fix, named or able.values())


def _tune(
    problems: list[Problem],
    target: Target,
    devices: tuple[int, ...],
    fixed: Fixed,
    begun: float,
    args: argparse.Namespace,
) -> int:
    from fagen.tuner import progress, recorded_space, tune
    from fagen.tuner.budget import BUDGET_SECONDS, duration
    from fagen.tuner.result import Options

    sampler, *more = samplers(args.sampler, SAMPLERS[:1])
    if more:
        raise UsageError("a run has one sampler", f"given: {args.sampler}", "--simulate compares several")
    budget = duration(args.budget) if args.budget else None
    if budget is None and args.trials is None and args.record is None:
        budget = BUDGET_SECONDS
    options = Options(
        budget=budget, trials=args.trials, seed=args.seed, workers=args.workers, devices=devices,
        compile_timeout=duration(args.compile_timeout), run_timeout=duration(args.run_timeout),
        resume=args.resume, out=args.out, family=args.family, storage=args.storage, fixed=fixed,
        exhaustive=args.record is not None, sampler=sampler, cold=args.cold, begun=begun,
    )  # fmt: skip
    report = tune.run(problems, target, options, progress.make())
    say()
    say(progress.table(report))
    say(progress.closing(report, resuming(sys.argv[1:], report.run)))
    if args.record:
        say(f"{recorded_space.export(report.run, args.record)} configs recorded in {args.record}")
    if args.json:
        emit_json(report.to_dict())
    return report.exit_code


def gpus(words: str, target: str | None) -> tuple[int, ...]:
    """The GPUs of --gpus, which must be of one kind: the winner is to serve each of them."""
    from fagen.target import count, gpu

    if target not in (None, "gpu"):
        raise UsageError("--gpus names the devices, and so does --target", f"--target {target}", "drop one of them")
    here = count()
    chosen = [str(i) for i in range(here)] if words == "all" else [word.strip() for word in words.split(",")]
    if not all(map(parse.is_number, chosen)):
        raise UsageError(f"--gpus {schema.shown(words)} cannot be read", "it is all, or numbers like 0,1,3")
    found = {int(word): gpu(int(word)) for word in chosen}
    absent = [str(i) for i, kind in found.items() if kind is None]
    if absent or not found:
        raise MissingTool(
            f"there is no GPU {', '.join(absent)}".rstrip(), f"torch sees {here}", "fagen doctor says more"
        )
    if len(set(found.values())) > 1:
        kinds = "; ".join(f"{i}: {kind}" for i, kind in found.items())
        raise UsageError("--gpus names GPUs of different kinds", kinds, "tune each kind by itself, with --gpus")
    return tuple(found)


def _list_presets(as_json: bool) -> int:
    if as_json:
        emit_json({name: dataclasses.asdict(preset) for name, preset in presets.PRESETS.items()})
    else:
        say(presets.table())
    return 0


def _simulate(args: argparse.Namespace) -> int:
    """Replay, show, and compare with what is expected."""
    from fagen.tuner import recorded_space, simulate

    if args.storage:  # a password in it would stand in the command that --json repeats
        raise UsageError("--storage is of a search, and a simulation runs none", remedy="drop --storage")
    if args.expect:
        simulate.expectation(args.expect)  # before minutes are spent
    spaces = [space for path in args.simulate for space in recorded_space.read(path)]
    for space in spaces:
        if not space.complete:
            say(f"note: {space.head['key']} has {len(space.entries)} of {space.head['legal']} configs")
    summaries = simulate.simulate(
        spaces, samplers(args.sampler, SAMPLERS), args.seeds,
        workers=args.workers or simulate.WORKERS, trials=args.trials, cold=args.cold, jobs=args.jobs,
    )  # fmt: skip
    say(simulate.table(summaries))
    missed = simulate.misses(summaries, args.expect) if args.expect else []
    for line in missed:
        say(f"missed: {line}")
    if args.json:
        command = shlex.join(["fagen", *sys.argv[1:]])
        emit_json({"command": command, "summaries": [s.to_dict() for s in summaries], "missed": missed})
    return 1 if missed else 0


def _dry_run(problems: list[Problem], target: Target, family: str | None, fixed: Fixed, as_json: bool) -> int:
    from fagen.tuner import progress, tune

    spaces = [space.of(problem) for problem in problems for space in tune.spaces(problem, target, family, fixed)]
    if as_json:
        rows = [
            {"key": s.problem.key, "problem": s.problem.to_dict(), "family": s.family.name, "total": s.total,
             "legal": len(s.legal), "removed": s.removed}
            for s in spaces
        ]  # fmt: skip
        emit_json({"target": str(target), "spaces": rows})
    else:
        say(f"target {target}; nothing is run")
        say(progress.space_table(spaces))
    return 0


def _present(name: str | None, target: Target) -> Target:
    """The device itself, and its compiler there as well."""
    from fagen.build import toolchain

    toolchain.require_nvcc() if target.is_gpu else toolchain.require_cxx()
    return arguments.present(name, target, "tuning for", "use --dry-run, or --target cpu")
