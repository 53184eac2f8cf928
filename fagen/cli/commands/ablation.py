"""fagen ablation: each design change by itself, as steps of a few knobs, measured in one run on this device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fagen.bench import output
from fagen.cli import arguments, results
from fagen.errors import INTERRUPTED, UsageError
from fagen.notices import emit_json, say
from fagen.target import Target

_EXAMPLES = """examples:
  fagen ablation                                   the ablations that ship
  fagen ablation fa1-fa2-fa3 --dry-run                its steps, and what this machine cannot run of them
  fagen ablation fa1-fa2-fa3 --out ablation.json --markdown ablation.md --plot ablation.svg
  fagen ablation fa1-fa2-fa3 --head-dim 128 --mask causal --seqlen 4k,16k
  fagen ablation fa1-fa2-fa3 --target cpu
  fagen ablation mine.toml                         one of your own: docs/ablation.md
  fagen ablation --show ablation.json --plot x.svg a result of --out once more, nothing measured
"""
_SIZES = {
    "dtype": "fp16, bf16 or fp32",
    "head_dim": "64,128, or 192-128 when q/k and v differ",
    "mask": "none, causal or both",
    "seqlen": "length of queries and keys: 1k,4k",
    "tokens": "of all sequences together: the batch is tokens / length",
    "hidden": "columns of all heads together: there are hidden / head dim heads",
}


def add(subparsers: argparse._SubParsersAction) -> None:
    about = "Build, verify and time the steps of a story against each other, in one run."
    parser = arguments.add_verb(subparsers, "ablation", about, _EXAMPLES)
    parser.add_argument(
        "ablation", nargs="?", metavar="NAME", help="of one that ships, or a TOML file; none: list them"
    )
    arguments.add_target_flag(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured; needs no such device")
    parser.add_argument("--steps", metavar="LIST", help="these alone, by name")
    parser.add_argument("--show", type=Path, metavar="FILE", help="report a result of --out, and measure nothing")
    sizes = parser.add_argument_group("problems", "in place of the ablation's own")
    for name, text in _SIZES.items():
        metavar = "N" if name in ("tokens", "hidden") else "T" if name == "dtype" else "LIST"
        sizes.add_argument("--" + name.replace("_", "-"), metavar=metavar, help=text)
    results.add_flags(parser, rounds=11, least=0.2, of="problem")


def run(args: argparse.Namespace) -> int:
    from fagen.ablation import spec

    if args.show:
        results.require(args)
        return _report(args, _read(args))
    if args.ablation is None:
        return _list(args)
    target = arguments.target_from(args.target) if args.dry_run else results.present(args.target)
    told = _some(spec.load(args.ablation, gpu=target.is_gpu), args.steps)
    chosen = spec.problems(told, {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None})
    if args.dry_run:
        return _dry(args, told, chosen, target)
    results.require(args)
    result: dict[str, Any] = {}
    try:
        _measure(args, told, chosen, target, result)
    except KeyboardInterrupt:
        if not result.get("problems"):
            raise
        say(f"interrupted after {len(result['problems'])} of {len(chosen)} problems")
        _report(args, result)
        return INTERRUPTED
    return _report(args, result)


def _read(args: argparse.Namespace) -> dict[str, Any]:
    from fagen.ablation import run

    if args.ablation is not None:
        raise UsageError("--show takes no ablation", f"it reports {args.show} alone")
    result = output.read(args.show, run.FORMAT, "problems")
    output.save(args.out, result)
    return result


def _list(args: argparse.Namespace) -> int:
    import tomllib

    from fagen.ablation import spec

    found = {name: tomllib.loads(path.read_text())["title"] for name, path in spec.shipped().items()}
    for name, title in found.items():
        say(f"{name}  {title}")
    if args.json:
        emit_json(found)
    return 0


def _some(told: Any, words: str | None) -> Any:
    """The ablation with some of its steps; each keeps the settings it has from those before it."""
    import dataclasses

    if words is None:
        return told
    names, known = words.split(","), [step.name for step in told.steps]
    for name in names:
        if name not in known:
            raise UsageError(f"step {name!r} is unknown", f"known: {', '.join(known)}")
    return dataclasses.replace(told, steps=tuple(step for step in told.steps if step.name in names))


def _dry(args: argparse.Namespace, told: Any, chosen: list[Any], target: Target) -> int:
    from fagen.ablation import plan

    plans = {problem.key: plan.plan(told, problem, target) for problem in chosen}
    kernels = {spec.key for of_problem in plans.values() for p in of_problem for spec in p.specs}
    say(f"{told.title}: {len(chosen)} problems, {len(kernels)} kernels, on {target}")
    for step in told.steps:
        mine = [p for of_problem in plans.values() for p in of_problem if p.step == step.name]
        lacking = {p.reason for p in mine if not p.specs}
        say(f"  {step.name:<14} {'; '.join(sorted(lacking)) or step.says}")
    if args.json:
        emit_json(
            {
                key: {
                    p.step: {"reason": p.reason, "configs": [dict(spec.config) for spec in p.specs]} for p in of_problem
                }
                for key, of_problem in plans.items()
            }
        )
    return 0


def _measure(args: argparse.Namespace, told: Any, chosen: list[Any], target: Target, result: dict[str, Any]) -> None:
    """Fills the result, problem by problem."""
    from fagen.ablation import report, run
    from fagen.db.record import environment, now
    from fagen.timing.machine import Machine

    settings = run.Settings(args.rounds, args.min_time, args.seed)
    result |= {
        "format": run.FORMAT, "ablation": told.name, "title": told.title, "command": results.command(), "date": now(),
        "device": target.device, "arch": target.arch, "environment": environment(target),
        "settings": vars(settings), "complete": False, "steps": run.described(told),
        "limit": {"what": "", "samples": [], "tflops": 0.0, "gbps": 0.0}, "problems": [], "summary": {},
    }  # fmt: skip
    say(f"{target}: {told.title}; {len(chosen)} problems, {len(told.steps)} steps")

    def on_problem(problem: dict[str, Any]) -> None:
        result["problems"].append(problem)
        result["summary"] = run.summary(result["problems"])
        say(f"{len(result['problems']):>3}/{len(chosen)}  {report.line(problem)}")
        output.save(args.out, result)  # a run that is cut off keeps what it had

    run.run_ablation(told, chosen, target, settings, say=say, on_problem=on_problem)
    machine = Machine(target)
    result["limit"]["samples"].append(machine.sample("end"))
    result["limit"] |= {"what": machine.what, **machine.limits()}
    result["complete"] = True
    output.save(args.out, result)


def _report(args: argparse.Namespace, result: dict[str, Any]) -> int:
    from fagen.ablation import plot, report

    say()
    say(report.tables(result))
    say()
    for text in report.closing(result):
        say(text)
    if args.markdown:
        args.markdown.write_text(report.markdown(result))
    if args.csv:
        args.csv.write_text(report.as_csv(result))
    if args.plot:
        plot.draw(result, args.plot)
    if args.json:
        emit_json(result)
    outcomes = {facts["outcome"] for problem in result["problems"] for facts in problem["steps"].values()}
    return 1 if outcomes & {"wrong", "failed"} else 0
