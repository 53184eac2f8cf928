"""cpu_softmax against the oracle: every scheme, both directions, rows and columns, all dtypes, ragged lengths."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fagen.codegen.spec import KernelSpec
from fagen.errors import InvalidArgument
from fagen.families import cpu_softmax
from fagen.families.space import enumerate_space
from fagen.ops.softmax import calls
from fagen.ops.softmax.problem import SoftmaxProblem
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel
from fagen.target import host, known
from tests.support.softmax import check_rows, sized, verify

FAMILY = cpu_softmax.FAMILY
# around vectors of 4, 8 and 16, several of them, and chunks of 1024 and 4096
LENGTHS = (1, 3, 17, 31, 64, 257, 1024, 1500, 4097, 9000)
# Each scheme, direction, dtype, cast and axis in some kernel, few enough that their compilation costs little. Some are
# the defaults, which other tests compile as well.
KERNELS: tuple[dict[str, Any], ...] = (
    {},
    {"scheme": "two_pass", "unroll": 8, "chunk": 1024},
    {"scheme": "three_pass", "dtype": "bf16", "unroll": 2, "chunk": 1024},
    {"dtype": "fp16"},
    {"dtype": "fp16", "out_dtype": "fp32", "log": True},
    {"direction": "backward", "dtype": "fp32", "out_dtype": "fp16"},
    {"direction": "backward", "dtype": "bf16", "log": True, "unroll": 1, "chunk": 1024},
    {"along": "column"},
    {"along": "column", "scheme": "two_pass", "dtype": "fp16", "unroll": 2, "chunk": 1024},
    {"along": "column", "log": True, "scheme": "three_pass", "dtype": "fp32", "unroll": 1, "chunk": 1024},
    {"along": "column", "direction": "backward"},
)


@functools.cache
def build(index: int) -> Kernel:
    words = dict(KERNELS[index])
    knobs = {name: words.pop(name) for name in ("scheme", "unroll", "chunk") if name in words}
    problem = SoftmaxProblem(**words)
    config = FAMILY.default(problem, host()).replace(**knobs)
    return kernel.get(KernelSpec(FAMILY, problem, host(), config))


@pytest.mark.parametrize("index", range(len(KERNELS)), ids=lambda i: "-".join(map(str, KERNELS[i].values())) or "plain")
def test_right_at_every_length(index: int) -> None:
    made = build(index)
    for number, problem in enumerate(sized(made.spec.problem, LENGTHS, (1, 3, 2, 7, 70))):
        verify(problem, made.launch, seed=number)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 7, 8, 9])
def test_rows_that_are_not_finite(index: int) -> None:
    made = build(index)
    for length in (60, 9001):  # one chunk, and several of which some are masked alone
        check_rows(made.spec.problem, made.launch, length)


def test_a_chunk_of_nothing_leaves_no_trace() -> None:
    """-inf fills the first chunks, the last alone has numbers; and the reverse."""
    for index in (0, 1, 7):
        made = build(index)
        rows = torch.full((2, 3 * 4096), -torch.inf)
        rows[0, -5:], rows[1, :5] = torch.arange(5.0), torch.arange(5.0)
        x = rows[None] if made.spec.problem.along == "row" else rows.T.contiguous()[None]
        call = calls.SoftmaxCall(x, torch.float32, made.spec.problem.along)
        out = torch.full_like(x, 7)
        made.launch(call, {"out": out})
        torch.testing.assert_close(out, calls.by_torch(call))


@pytest.mark.parametrize("index", [0, 3, 5])
def test_the_threads_change_no_bit(index: int) -> None:
    """One thread has the row, or many share it: chunks are of the length alone."""
    made = build(index)
    results = []
    for rows in (1, 3, 16):  # of which the first is always the same
        problem = made.spec.problem.replace(rows=rows, columns=100_003)
        inputs = calls.inputs(problem.replace(rows=16), host(), 5, False)
        cut = {name: t[:, :rows] for name, t in inputs.call.inputs().items()}
        call = calls.SoftmaxCall(cut["x"], inputs.call.out_dtype, "row", False, cut.get("dout"))
        made.launch(call, {"out": inputs.outputs["out"][:, :rows]})
        results.append(inputs.outputs["out"][0, 0].clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_wrong_kernel_is_found() -> None:
    """The oracle of a long row is no looser than that of a short one: one part in a thousand is an error."""
    problem = SoftmaxProblem(rows=2, columns=60_000)
    made = calls.inputs(problem, host(), 0, False)
    build(0).launch(made.call, made.outputs)
    assert calls.check(made.call, made.outputs)
    made.outputs["out"][0, 1, 30_000:] *= 1.001
    assert not calls.check(made.call, made.outputs)
    backward = calls.inputs(problem.replace(direction="backward"), host(), 0, False)
    assert calls.check(backward.call, {"out": calls.by_torch(backward.call)})
    wrong = calls.by_torch(backward.call) * 1.001
    assert not calls.check(backward.call, {"out": wrong})


def test_a_call_for_another_kernel_is_refused() -> None:
    made = calls.inputs(SoftmaxProblem(log=True), host(), 0, False)
    with pytest.raises(InvalidArgument, match="the kernel is for softmax/forward/fp32/row"):
        build(0).launch(made.call, made.outputs)


def test_the_space_and_its_constraints() -> None:
    for problem in (SoftmaxProblem(), SoftmaxProblem(log=True), SoftmaxProblem(along="column", dtype="bf16")):
        space = enumerate_space(FAMILY, problem, host())
        assert FAMILY.default(problem, host()) in space.legal
        assert set(FAMILY.first_configs(problem, host())) <= set(space.legal)
        kept = {c.scheme for c in space.legal}
        assert ("stored" in kept) == (not problem.log and problem.along == "row")
        assert {c.chunk for c in space.legal if c.scheme == "three_pass"} == {1024}
    backward = SoftmaxProblem(direction="backward")
    assert {c.scheme for c in enumerate_space(FAMILY, backward, host()).legal} == {"two_pass"}
    assert "needs a CPU" in str(FAMILY.supports(backward, known("sm_90")))
