"""`fagen explain`: which kernel a problem gets, and why no other."""

from __future__ import annotations

import argparse
from typing import Any

from fagen.cli.arguments import add_problem_flags, add_target_flag, add_verb, expand, problems_from, target_from
from fagen.notices import emit_json, say

_EXAMPLES = """examples:
  fagen explain --head-dim 128 --mask causal --seqlen 4k --heads 32 --kv-heads 8
  fagen explain --target sm_90 --head-dim 192-128 --dtype bf16
  fagen explain --problems serving.toml --json"""


def add(subparsers: Any) -> None:
    about = "Say which kernel a problem gets, where its config comes from, and why no other. Compiles nothing."
    parser = add_verb(subparsers, "explain", about, _EXAMPLES)
    add_problem_flags(parser)
    add_target_flag(parser)


def run(args: argparse.Namespace) -> int:
    from fagen import explanation

    target = target_from(args.target)
    problems = problems_from(args, target) or expand({}, target)
    reports = [explanation.explain_problem(problem, target) for problem in problems]
    for number, report in enumerate(reports):
        if number:
            say()
        say(str(report))
    if args.json:
        emit_json([report.to_dict() for report in reports])
    return 0
