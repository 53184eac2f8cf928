"""`fagen emit`: a kernel as files that need neither Python nor torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.cliutil import add_problem_flags, add_verb, emit_json, gib, one_problem, say
from fagen.errors import InvalidConfig, UnsupportedProblem, UsageError
from fagen.target import ARCHS, host, known, memory

if TYPE_CHECKING:
    from fagen.emit import Kernel
    from fagen.problem import Problem
    from fagen.target import Target

_EXAMPLES = """examples:
  fagen emit --arch sm_90 --head-dim 128 --dtype bf16 --mask causal --out attention
  fagen emit --arch sm_80 --head-dim 64 --dtype fp16 --out attention --build --example
  fagen emit --arch cpu --dtype fp32 --head-dim 64 --mask causal --config default --out attention --example"""


def add(subparsers: Any) -> None:
    about = "Write one kernel as files: the source in one piece, a C header, a manifest. Needs no GPU."
    parser = add_verb(subparsers, "emit", about, _EXAMPLES)
    parser.add_argument(
        "--arch", required=True, choices=ARCHS, help="what the kernel runs on: %(choices)s", metavar="A"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to; made if need be")
    parser.add_argument(
        "--config",
        default="best",
        metavar="C",
        help="'best' (this is the default): what was tuned, else the family's default; 'default'; or knobs as JSON",
    )
    parser.add_argument("--family", metavar="NAME", help="of this family alone (default: the first that can serve)")
    parser.add_argument("--build", action="store_true", help="compile kernel.so, and kernel.cubin for a GPU")
    parser.add_argument("--example", action="store_true", help="add a C++ main that checks and times the kernel")
    add_problem_flags(parser)


def run(args: argparse.Namespace) -> int:
    from fagen import emit

    target = known(args.arch)
    problem = one_problem(args, target)
    kernel = choose(problem, target, args.config, args.family)
    manifest = emit.write(kernel, args.out, example=args.example)
    if args.build:
        manifest = emit.compile_all(kernel, args.out, manifest, example=args.example)
    say(f"{kernel.family.name} for {kernel.problem.key} on {kernel.target.arch}: {kernel.config} ({kernel.provenance})")
    for name in [*manifest["files"], emit.MANIFEST]:
        say(f"  {args.out / name}")
    if manifest["facts"]:
        say("facts: " + ", ".join(f"{name} {value}" for name, value in manifest["facts"].items()))
    if args.example:
        if 0 < memory(host()) < problem.bytes():
            have = f"this machine has {gib(memory(host()))}"
            say(f"note: the example's tensors take {gib(problem.bytes())}, {have}; a shorter --seqlen makes it smaller")
        say(f"build and run the example: cd {args.out} && {manifest['example']} && ./example")
    if args.json:
        emit_json({"folder": str(args.out), **manifest})
    return 0


def choose(problem: Problem, target: Target, config: str, only: str | None = None) -> Kernel:
    """The kernel of a --config, of one family alone if that is asked for."""
    from fagen.emit import Kernel
    from fagen.families import candidates, get

    able, reasons = candidates(problem, target)
    if only is not None:
        able = [family for family in able if family.name == get(only).name]
    if not able:
        text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UnsupportedProblem(f"no family can make {problem.static_key} for {target.arch}", text)
    if config == "default":
        return Kernel(able[0], problem, target, able[0].default(problem, target), "the family's default")
    if config != "best":
        return _given(able, problem, target, config)
    if only is not None:
        raise UsageError("--family goes with --config default or with knobs as JSON")
    from fagen import dispatch

    choice = dispatch.choose(problem, target)
    if choice.family is None or choice.config is None:
        raise UnsupportedProblem(f"no kernel serves {problem.static_key} on {target.arch}", "; ".join(choice.reasons))
    words = f"tuned on {choice.record.device}, {choice.provenance}" if choice.record else "the family's default"
    if choice.trust and choice.trust.state not in ("current", "verified"):
        words += f", {choice.trust.state}: the source has changed since"
    return Kernel(choice.family, problem, target, choice.config, words)


def _given(able: list[Any], problem: Problem, target: Target, config: str) -> Kernel:
    from fagen.emit import Kernel

    try:
        values = json.loads(config)
    except ValueError as error:
        raise UsageError(f"--config {config!r} is neither best, default nor JSON", str(error)) from error
    if not isinstance(values, dict):
        raise UsageError("--config is no JSON object", config)
    for family in able:
        try:
            chosen = family.require(problem, target, family.config(values))
        except InvalidConfig:
            if family is able[-1]:
                raise
            continue
        return Kernel(family, problem, target, chosen, "as given")
    raise AssertionError("able is never empty")
