"""A softmax problem as flags and TOML files spell it, and the flags that the op writes itself."""

from __future__ import annotations

from typing import Any

import pytest

from fagen import ops
from fagen.cli import arguments, main
from fagen.errors import UsageError
from fagen.ops.softmax.problem import SoftmaxProblem
from fagen.target import host, known


def test_lists_multiply() -> None:
    found: Any = arguments.expand(
        {"op": "softmax", "dtype": "fp16,bf16", "columns": "1k,32000", "rows": 5, "direction": "backward"},
        known("sm_90"),
    )
    assert [p.size_key for p in found] == ["b1/r5-c1024", "b1/r5-c32000"] * 2
    assert {p.static_key for p in found} == {"softmax/backward/fp16/row", "softmax/backward/bf16/row"}
    (plain,) = arguments.expand({"op": "softmax"}, host())
    assert plain == SoftmaxProblem(dtype="fp32", rows=64, columns=1024)


def test_a_problem_file(tmp_path) -> None:
    path = tmp_path / "problems.toml"
    path.write_text('[[problem]]\nop = "softmax"\nlog = true\ncolumns = "4k"\n[[problem]]\nhead_dim = 64\n')
    one, other = arguments.problems_in(path, host())
    assert one.key == "softmax/forward/fp32/row/log/b1/r64-c4096" and other.op == "forward"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"op": "softmax", "heads": 4}, "--heads is of attention"),
        ({"op": "softmax", "head_dim": 64}, "--head-dim is of attention"),
        ({"rows": 4}, "--rows needs op softmax"),
        ({"op": "backward", "log": True}, "--log needs op softmax"),
        ({"op": "softmax", "log": "yes"}, "log is true or false"),
        ({"op": "softmax", "along": "both"}, "along 'both' is unknown"),
        ({"op": "softmax", "dtype": "fp64"}, "dtype 'fp64' is unknown"),
        ({"op": "softmax", "columns": "0"}, "'0' is no size"),
        ({"op": "softmax", "out_dtype": "int8"}, "dtype 'int8' is unknown"),
    ],
)
def test_what_cannot_be_is_said(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        arguments.expand(settings, host())


@pytest.mark.parametrize(
    "problem",
    [
        SoftmaxProblem(), SoftmaxProblem(log=True, along="column", batch=3),
        SoftmaxProblem(direction="backward", dtype="fp32", out_dtype="bf16", rows=7, columns=9),
    ],
    ids=str,
)  # fmt: skip
def test_the_flags_of_the_op_make_the_problem_again(problem: SoftmaxProblem) -> None:
    """Errors and emitted kernels name commands with them."""
    words = ["explain", *ops.get("softmax").flags(problem)]
    args = main._parser("explain").parse_args(words)
    assert arguments.problems_from(args, host()) == [problem]


def test_bench_takes_problems_of_its_own() -> None:
    from fagen.cli.commands import bench

    def rows_of(*words: str) -> list[str]:
        args = main._parser("bench").parse_args(["bench", "--target", "cpu", *words])
        return [row.name for row in bench.rows_from(args, host())]

    assert rows_of("--op", "softmax", "--columns", "64") == ["forward/fp32/row/b1/r64-c64"]
    assert rows_of("--op", "softmax") == ["forward/fp32/row/b1/r64-c1024"]
    assert all(name.startswith("backward") for name in rows_of("--suite", "softmax", "--op", "backward"))
    with pytest.raises(UsageError, match="measures problems of flags"):
        rows_of("--suite", "softmax", "--op", "softmax")
