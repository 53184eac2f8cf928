"""`fagen emit`: a kernel as files that need neither Python nor torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.cli.arguments import add_problem_flags, add_target_flag, add_verb, gib, one_problem, target_from
from fagen.errors import InvalidConfig, UnsupportedProblem, UsageError
from fagen.notices import emit_json, say
from fagen.target import host, memory

if TYPE_CHECKING:
    from fagen.codegen.spec import KernelSpec
    from fagen.ops.attention.problem import Problem
    from fagen.target import Target

_EXAMPLES = """examples:
  fagen emit --target sm_90 --head-dim 128 --dtype bf16 --mask causal --out attention
  fagen emit --target sm_80 --head-dim 64 --dtype fp16 --out attention --build --example
  fagen emit --target cpu --dtype fp32 --head-dim 64 --mask causal --config default --out attention --example
  fagen emit --op decode --target sm_80 --dtype bf16 --head-dim 128 --page 16 --out decode --example
  fagen emit --family sm90_forward --out attention         the default problem, on a target that the family is for"""


def add(subparsers: Any) -> None:
    about = "Write one kernel as files: the source in one piece, a C header, a manifest. Needs no GPU."
    parser = add_verb(subparsers, "emit", about, _EXAMPLES)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to; made if need be")
    parser.add_argument(
        "--config",
        default="best",
        metavar="C",
        help="'best' (this is the default): what was tuned, else the family's default; 'default'; or knobs as JSON",
    )
    parser.add_argument("--family", metavar="NAME", help="of this family alone (default: whatever dispatch picks)")
    parser.add_argument("--build", action="store_true", help="compile kernel.so, and kernel.cubin for a GPU")
    parser.add_argument("--example", action="store_true", help="add a C++ main that checks and times the kernel")
    add_problem_flags(parser)
    add_target_flag(parser)


def run(args: argparse.Namespace) -> int:
    from fagen.codegen import emit

    problem, target = _asked(args)
    spec, provenance = choose(problem, target, args.config, args.family)
    manifest = emit.write(spec, provenance, args.out, example=args.example)
    if args.build:
        manifest = emit.compile_all(spec, args.out, manifest, example=args.example)
    say(f"{spec.family.name} for {problem.key} on {target.arch}: {spec.config} ({provenance})")
    for name in [*manifest["files"], emit.MANIFEST]:
        say(f"  {args.out / name}")
    if manifest["facts"]:
        plain = {name: value for name, value in manifest["facts"].items() if name != "functions"}
        say("facts: " + ", ".join(f"{name} {value}" for name, value in plain.items()))
    if args.example:
        if 0 < memory(host()) < problem.bytes():
            have = f"this machine has {gib(memory(host()))}"
            say(f"note: the example's tensors take {gib(problem.bytes())}, {have}; a shorter --seqlen makes it smaller")
        say(f"build and run the example: cd {args.out} && {manifest['example']} && ./example")
    if args.json:
        emit_json({"folder": str(args.out), **manifest})
    return 0


def _asked(args: argparse.Namespace) -> tuple[Problem, Target]:
    """The problem and the target of the flags. A --family without --target names a target, too: one it is for."""
    from fagen.families import get
    from fagen.target import ARCHS, known

    target = target_from(args.target)
    problem = one_problem(args, target)
    if args.family is None or args.target is not None or get(args.family).supports(problem, target) is None:
        return problem, target
    for other in map(known, ARCHS):
        there = one_problem(args, other)
        if get(args.family).supports(there, other) is None:
            return there, other
    return problem, target  # no target will do: choose says why this one does not


def choose(problem: Problem, target: Target, config: str, only: str | None = None) -> tuple[KernelSpec, str]:
    """The kernel of a --config, of one family alone if that is asked for; and where its config comes from."""
    from fagen.codegen.spec import KernelSpec
    from fagen.families import candidates, get

    able, reasons = candidates(problem, target)
    if only is not None:
        able = [family for family in able if family.name == get(only).name]
        reasons = {only: reasons.get(only, "")}
    if not able:
        text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UnsupportedProblem(f"no family can make {problem.static_key} for {target.arch}", text)
    if config == "default":
        first = min(able, key=lambda family: not family.suits(problem))
        return KernelSpec(first, problem, target, first.default(problem, target)), "the family's default"
    if config != "best":
        return _given(able, problem, target, config)
    if only is not None:
        return _best_of(only, problem, target)
    from fagen.dispatch.choose import choose as choose_kernel

    choice = choose_kernel(problem, target, ours=True, idle=True)
    if choice.spec is None:
        raise UnsupportedProblem(f"no kernel serves {problem.static_key} on {target.arch}", "; ".join(choice.reasons))
    words = f"tuned on {choice.record.device}, {choice.provenance}" if choice.record else "the family's default"
    if choice.trust and choice.trust.state not in ("current", "verified"):
        words += f", {choice.trust.state}: the source has changed since"
    return choice.spec, words


def _best_of(only: str, problem: Problem, target: Target) -> tuple[KernelSpec, str]:
    """The family's best record that fits, else its default."""
    from fagen.bench.family import pick
    from fagen.dispatch.choose import PROVENANCES

    spec, provenance = pick(problem, target, only)
    words = "the family's default" if provenance == "default" else f"{provenance}: {PROVENANCES[provenance]}"
    return spec, words


def _given(able: list[Any], problem: Problem, target: Target, config: str) -> tuple[KernelSpec, str]:
    from fagen.codegen.spec import KernelSpec

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
        return KernelSpec(family, problem, target, chosen), "as given"
    raise AssertionError("able is never empty")
