"""The registry of ops: ours, and those of the extensions."""

from __future__ import annotations

import shlex
from typing import Any

from fagen import extensions
from fagen.errors import InvalidArgument
from fagen.ops.base import Op, Problem
from fagen.schema import shown


def all_ops() -> tuple[Op, ...]:
    from fagen.ops.attention import backward, decode, forward, fp8
    from fagen.ops.softmax import op as softmax

    return extensions.with_offered((forward.OP, backward.OP, decode.OP, softmax.OP, fp8.OP), "OPS")


def get(name: str) -> Op:
    for op in all_ops():
        if op.name == name:
            return op
    raise InvalidArgument(f"op {shown(name)} is unknown", f"known: {', '.join(op.name for op in all_ops())}")


def problem_from(fields: Any) -> Any:
    """A problem from the dict that `to_dict` made, whoever wrote it. Raises InvalidArgument with what is wrong."""
    if not isinstance(fields, dict):
        raise InvalidArgument(f"a problem is no JSON object: {shown(fields)}")
    return get(fields.get("op", "forward")).problem.from_dict(fields)


def is_problem(value: Any) -> bool:
    return isinstance(value, tuple(op.problem for op in all_ops()))


def build_command(problem: Problem, arch: str) -> str:
    """The `fagen build` that makes what the problem gets on this machine's CPU or GPU."""
    words = get(problem.op).flags(problem)
    return shlex.join(["fagen", "build", *words, *(["--target", "cpu"] if arch == "cpu" else [])])
