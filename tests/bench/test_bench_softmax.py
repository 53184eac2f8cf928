"""The suite softmax of fagen bench: its rows, its peers, and a row that is verified and timed."""

from __future__ import annotations

import functools
import sys
import types
from pathlib import Path

import pytest
import torch

from fagen.bench import peers, rows, run, softmax, suites
from fagen.build import toolchain
from fagen.cli import main
from fagen.errors import UsageError
from fagen.ops.softmax.problem import SoftmaxProblem
from fagen.target import host, known

pytestmark = pytest.mark.usefixtures("quick_machine")


def test_its_rows() -> None:
    for op, count in (("forward", 1), ("backward", 2)):
        found = suites.suite("softmax", known("sm_90"), op=op)
        assert {row.problem.direction for row in found} == {op} and {row.op for row in found} == {"softmax"}
        assert {row.problem.dtype for row in found} == {"bf16", "fp32"}
        assert {row.problem.along for row in found} == {"row", "column"}
        assert max(row.length for row in found) == 1 << 20
        first = found[0]
        assert rows.least_bytes(first) == first.problem.bytes() == (count + 1) * 64 * 128 * 2
        assert rows.flops(first, None) == first.problem.flops() > 0
    assert max(row.problem.bytes() for row in suites.suite("softmax", host())) <= 1 << 30


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_is_verified_and_timed(direction: str) -> None:
    row = rows.Row("a row", SoftmaxProblem(direction=direction, rows=300, columns=64))

    def wrong(row: rows.Row, inputs: rows.Inputs) -> peers.Serve:
        return lambda i: torch.zeros_like(i.call.x)

    others = {"torch_softmax": softmax.eager({}).by_op["softmax"], "wrong": wrong}
    settings = run.Settings(rounds=3, min_seconds=0.0)
    found: list[run.Result] = []
    run.bench([row], others, host(), settings, on_row=found.append)
    outcomes = {name: facts["outcome"] for name, facts in found[0]["participants"].items()}
    assert outcomes == {"fagen": "ok", "torch_softmax": "ok", "wrong": "wrong"}
    assert found[0]["bound"] == "memory" and found[0]["ratio"] > 0 and found[0]["choice"]["served_by"] == "kernel"
    assert found[0]["choice"]["family"] == "cpu_softmax" and found[0]["length"] == 64


def test_the_textbooks_formulas_are_right() -> None:
    """What the compiled peer is made of."""
    from fagen import ops

    for log in (False, True):
        for direction in ("forward", "backward"):
            problem = SoftmaxProblem(direction=direction, log=log, rows=9, columns=70)
            calls = ops.get("softmax").calls()
            call = calls.inputs(problem, "cpu", 0, False).call
            function = softmax._backward if direction == "backward" else softmax._forward
            made = function(*call.inputs().values(), axis=2, log=log, dtype=torch.float32)
            assert calls.check(call, {"out": made})


def test_torch_compile_does_not_run_out_of_recompilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row compiles the same function anew; torch gives up after eight of them unless it forgets the former."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    prepare = softmax.compiled({}).by_op["softmax"]
    assert callable(prepare)
    for length in range(10, 22):
        row = rows.Row("a row", SoftmaxProblem(rows=3, columns=length))
        inputs = rows.make_inputs(row, "cpu")
        assert run.verified(prepare(row, inputs)(inputs), inputs.call, 0)[0]


def test_quack_by_its_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of its module: rows of two dimensions, the gradient before what forward made."""

    def softmax_bwd(dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert dy.dim() == y.dim() == 2
        return y * (dy - (y * dy).sum(1, keepdim=True))

    functions = types.SimpleNamespace(softmax_fwd=lambda x: torch.softmax(x, dim=1), softmax_bwd=softmax_bwd)
    prepare = softmax.through_quack(functions)
    for direction in ("forward", "backward"):
        row = rows.Row("a row", SoftmaxProblem(direction=direction, batch=2, rows=3, columns=70))
        inputs = rows.make_inputs(row, "cpu")
        assert run.verified(prepare(row, inputs)(inputs), inputs.call, 0)[0]
    for problem in (SoftmaxProblem(along="column", rows=3, columns=9), SoftmaxProblem(log=True, rows=3, columns=9)):
        with pytest.raises(peers.Cannot, match="along contiguous rows"):
            prepare(rows.Row("a row", problem), rows.make_inputs(rows.Row("a row", problem), "cpu"))
    monkeypatch.setitem(sys.modules, "quack", None)
    _, absent = peers.load(["quack"], "cuda", {}, "softmax")
    assert "pip install quack-kernels" in absent["quack"]
    _, absent = peers.load(["quack"], "cuda", {"fa4": Path("nowhere")}, "softmax")
    assert "--fa4 nowhere holds no quack" in absent["quack"]


def test_peers_and_suites_are_not_mixed() -> None:
    assert peers.chosen("all", "cpu", "softmax") == ["torch_softmax", "compiled_softmax"]
    assert "torch_softmax" not in peers.chosen("all", "cuda")
    with pytest.raises(UsageError, match="peer sdpa computes no softmax"):
        peers.chosen("sdpa", "cpu", "softmax")
    with pytest.raises(UsageError, match="peer compiled_softmax computes no forward"):
        peers.chosen("compiled_softmax", "cpu")
    assert main.main(["bench", "--suite", "softmax,small", "--target", "cpu"]) == UsageError.exit_code
