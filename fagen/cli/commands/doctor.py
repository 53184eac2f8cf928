"""`fagen doctor`: what is missing on this machine, what that costs, how to get it."""

from __future__ import annotations

import argparse
from typing import Any

from fagen.cli.arguments import add_verb
from fagen.notices import emit_json, say

_EXAMPLES = """examples:
  fagen doctor
  fagen doctor --json | python -m json.tool

exit codes: 0 all is well, 1 something needs repair, 4 a tool is missing"""


def add(subparsers: Any) -> None:
    about = "Look for compilers, torch, the GPU, its driver, and folders that can be written."
    add_verb(subparsers, "doctor", about, _EXAMPLES)


def run(args: argparse.Namespace) -> int:
    from fagen.cli import doctor

    findings = doctor.examine()
    for finding in findings:
        say(f"{finding.status:<8} {finding.name}: {finding.detail}")
        if finding.cost:
            say(f"{'':<10} cost: {finding.cost}")
        if finding.remedy:
            say(f"{'':<10} do:   {finding.remedy}")
    code = doctor.exit_code(findings)
    if args.json:
        emit_json({"ok": code == 0, "findings": [finding.to_dict() for finding in findings]})
    return code
