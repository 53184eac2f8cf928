"""`fagen build`: compile kernels ahead of their first use."""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fagen.cli.arguments import add_problem_flags, add_target_flag, add_verb, count, problems_from, target_from
from fagen.codegen.spec import KernelSpec
from fagen.errors import FagenError, UsageError
from fagen.notices import emit_json, say
from fagen.ops.attention.parse import size

if TYPE_CHECKING:
    from fagen.dispatch.choose import Choice
    from fagen.ops.attention.problem import Problem
    from fagen.runtime.helper import Helper
    from fagen.target import Target

_EXAMPLES = """examples:
  fagen build --dtype bf16 --head-dim 128 --mask causal --seqlen 1k,4k,16k --heads 32 --kv-heads 8
  fagen build --preset llama3-8b --max-seqlen 128k
  fagen build --problems serving.toml --jobs 8
  fagen build --op backward --dtype bf16 --head-dim 128 --mask causal --seqlen 4k --heads 32
  fagen build --all-records

Sizes matter where they were tuned: another size may have another winner, which is another kernel.
With --op backward the forward kernels are built, too: a step of training needs both."""


def add(subparsers: Any) -> None:
    about = "Compile the kernels that these problems get on this machine, and the binding to torch."
    parser = add_verb(subparsers, "build", about, _EXAMPLES)
    parser.add_argument("--all-records", action="store_true", help="every winner of the database for this target")
    parser.add_argument(
        "--max-seqlen",
        metavar="N",
        help="whatever these problems get at any batch and any lengths up to N, like 128k",
    )
    parser.add_argument("--jobs", type=count, metavar="N", help="compilers at a time (default: cores and memory)")
    add_problem_flags(parser)
    add_target_flag(parser)


def run(args: argparse.Namespace) -> int:
    from fagen.build.compilers import compile_workers
    from fagen.dispatch import choose, warmup
    from fagen.runtime import binding

    target = target_from(args.target)
    problems = problems_from(args, target)
    if args.all_records:
        problems += _recorded(target)
    elif not problems:
        raise UsageError("nothing to build", remedy="give problem flags, --problems FILE.toml or --all-records")
    problems = warmup.with_forward(problems)
    if args.max_seqlen:
        problems = _of_all_sizes(problems, target, size(args.max_seqlen))
    work: dict[Any, tuple[Problem, Choice]] = {}  # many size points share a kernel
    rows: list[dict[str, Any]] = []
    for problem in problems:
        choice = choose.choose(problem, target, ours=True)
        if choice.spec is None:
            say(f"{problem}: PyTorch serves it, nothing to build: {'; '.join(choice.reasons)}")
            rows.append({"problem": problem.key, "outcome": "torch", "reasons": choice.reasons})
        else:
            work.setdefault(choice.spec.key, (problem, choice))
    binding.make()  # the op needs it besides the kernels
    for helper in warmup.helpers_of(problems):
        rows += _build_helper(helper, target)
    with ThreadPoolExecutor(args.jobs or compile_workers(target.is_gpu)) as pool:
        rows += pool.map(lambda item: _build(item[1].spec), work.values())
        doubtful = [problem for problem, choice in work.values() if choice.trust and choice.trust.state == "unverified"]
        rows += pool.map(lambda item: _build(item[1].spec), _instead(doubtful, target, work).values())
    failed = sum(row["outcome"] == "failed" for row in rows)
    say(f"{sum(row['outcome'] == 'ok' for row in rows)} kernels ready, {failed} failed")
    if args.json:
        emit_json(rows)
    return 1 if failed else 0


def _of_all_sizes(problems: list[Problem], target: Target, most: int) -> list[Problem]:
    from fagen.dispatch import choose, warmup

    problems = warmup.all_sizes(problems, target, most)
    kernels: dict[str, set[Any]] = {}
    for problem in problems:
        choice = choose.choose(problem, target, ours=True)
        kernels.setdefault(problem.static_key, set()).add(choice.spec.key if choice.spec else None)
    for key, some in kernels.items():
        say(f"{key}: {len(some - {None})} kernels serve any batch and all lengths up to {most}")
    return problems


def _instead(doubtful: list[Problem], target: Target, built: Collection[Any]) -> dict[Any, tuple[Problem, Choice]]:
    """What else to build for winners whose source has changed: they are verified now that they are built, and what
    would serve in the place of a wrong one, or of one that cannot be verified here, is built as well."""
    from fagen.dispatch import choose

    more: dict[Any, tuple[Problem, Choice]] = {}
    for problem in doubtful:
        choice = choose.choose(problem, target, check=True, ours=True)
        if choice.trust and choice.trust.state == "unverified":
            choice = choose.choose(problem, target, stale="refuse", ours=True)
        if choice.spec is not None and choice.spec.key not in built:
            more[choice.spec.key] = problem, choice
    return more


def _recorded(target: Target) -> list[Problem]:
    from fagen.db.store import Database

    return [record.problem for record in Database.load().records if record.arch == target.arch]


def _build_helper(helper: Helper, target: Target) -> list[dict[str, Any]]:
    """A row if it fails."""
    try:
        helper.build(target)
    except FagenError as error:
        say(f"{helper.name}: {error}")
        return [{"problem": helper.name, "outcome": "failed", "error": str(error)}]
    return []


def _build(spec: KernelSpec) -> dict[str, Any]:
    from fagen.build import cache

    key = spec.problem.static_key
    row = {"problem": spec.problem.key, "family": spec.family.name, "config": dict(spec.config)}
    start = time.perf_counter()
    try:
        artifact = cache.build(spec)
    except FagenError as error:
        say(f"{key}: {error}")
        return {**row, "outcome": "failed", "error": str(error)}
    say(f"{key}: {spec.config} ({time.perf_counter() - start:.1f} s)")
    return {**row, "outcome": "ok", "library": str(artifact.path), "facts": artifact.facts}
