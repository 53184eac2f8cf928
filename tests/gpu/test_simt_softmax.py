"""simt_softmax on a GPU against the oracle: every scheme, both directions, rows and columns; and the op."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fagen
from fagen import families, target
from fagen.codegen.spec import KernelSpec
from fagen.dispatch import resolve
from fagen.families import simt_softmax
from fagen.ops.softmax import calls
from fagen.ops.softmax.problem import SoftmaxProblem
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel
from tests.support.softmax import check_rows, sized, verify

FAMILY = simt_softmax.FAMILY
LENGTHS = (1, 7, 33, 256, 300, 1029, 2500, 8192, 50_257, 131_077, 1_000_003)
COLUMN = {"vector_bytes": 4, "lines": 32}
KERNELS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"dtype": "bf16"}, {"scheme": "three_pass"}),
    ({"dtype": "fp32"}, {"scheme": "two_pass", "threads": 32, "lines": 8}),
    ({"dtype": "fp32", "log": True}, {"scheme": "registers", "held": 8}),
    ({"dtype": "fp16"}, {"scheme": "registers", "held": 4, "threads": 8, "lines": 32, "fold_scale": True}),
    ({"dtype": "bf16"}, {"scheme": "shared", "held": 8, "threads": 512}),
    ({"dtype": "fp16", "out_dtype": "fp32"}, {"scheme": "split", "threads": 512}),
    ({"dtype": "fp32", "log": True}, {"scheme": "split", "threads": 128, "vector_bytes": 8}),
    ({"dtype": "bf16", "direction": "backward"}, {"scheme": "registers", "held": 4}),
    ({"dtype": "fp32", "out_dtype": "fp16", "direction": "backward", "log": True}, {"scheme": "split"}),
    ({"dtype": "fp32", "direction": "backward"}, {"scheme": "shared", "held": 4}),
    ({"dtype": "bf16"}, {"scheme": "registers", "threads": 512, "held": 8, "cluster": 8}),
    ({"dtype": "fp32", "direction": "backward"}, {"scheme": "shared", "held": 8, "cluster": 4}),
    ({"dtype": "bf16", "along": "column"}, {"scheme": "registers", "threads": 8, "held": 4, **COLUMN}),
    ({"dtype": "fp32", "along": "column"}, {"scheme": "split", "threads": 32, **COLUMN}),
    ({"dtype": "fp16", "along": "column", "direction": "backward"}, {"scheme": "two_pass", "threads": 32, **COLUMN}),
)
_BASE: dict[str, Any] = {"threads": 256, "lines": 1, "vector_bytes": 16, "held": 1, "cluster": 1, "fold_scale": False}


@functools.cache
def build(index: int) -> Kernel:
    words, knobs = KERNELS[index]
    if "cluster" in knobs and target.detect().capability < 90:
        pytest.skip("clusters need sm_90")
    where, problem = target.detect(), SoftmaxProblem(**words)
    return kernel.get(KernelSpec(FAMILY, problem, where, FAMILY.config({**_BASE, **knobs})))


@pytest.mark.parametrize("index", range(len(KERNELS)))
def test_right_at_every_length(index: int) -> None:
    made = build(index)
    for number, problem in enumerate(sized(made.spec.problem, LENGTHS, (1, 3, 5, 33, 70))):
        verify(problem, made.launch, seed=number, device="cuda")
    torch.cuda.synchronize()


@pytest.mark.parametrize("index", [i for i, (words, _) in enumerate(KERNELS) if "direction" not in words])
def test_rows_that_are_not_finite(index: int) -> None:
    made = build(index)
    for length in (8, 700, 40_001):
        check_rows(made.spec.problem, made.launch, length, device="cuda")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls go to the family, also as long as it serves none; and not to PyTorch."""
    monkeypatch.setattr(families, "serving", families.candidates)
    monkeypatch.setattr("fagen.softmax_api.by_torch", lambda call: pytest.fail("PyTorch served the call"))
    resolve.forget()
    yield
    monkeypatch.undo()
    resolve.forget()


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), [((64, 128), -1), ((3, 50_257), 1), ((2, 300_000), -1), ((9, 500, 70), 1)])
def test_the_op(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    """Defaults as dispatch picks them, with gradients."""
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    dout = torch.randn(shape, device="cuda").to(dtype)
    for mine, theirs in ((fagen.softmax, torch.softmax), (fagen.log_softmax, torch.log_softmax)):
        ours, wanted = mine(x, dim), theirs(x, dim)
        bound = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, wanted, rtol=bound, atol=bound)
        gradients = [torch.autograd.grad(y, x, dout)[0].float() for y in (ours, wanted)]
        size = gradients[1].abs().max()
        assert (gradients[0] - gradients[1]).abs().max() <= 4 * bound * size + 1e-6


@pytest.mark.usefixtures("served")
def test_one_row_of_16_m_elements() -> None:
    x = torch.randn(1, 1 << 24, device="cuda")
    made = calls.inputs(SoftmaxProblem(rows=1, columns=1 << 24), "cuda", 0, False)
    out = fagen.softmax(made.call.x, -1)
    verdict = calls.check_sample(made.call, {"out": out})
    assert verdict, verdict.message
    assert abs(float(fagen.softmax(x).double().sum()) - 1) < 1e-5


@pytest.mark.usefixtures("served")
def test_in_a_cuda_graph() -> None:
    x = torch.randn(100, 3000, device="cuda")
    with torch.no_grad():
        for _ in range(2):
            fagen.softmax(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fagen.softmax(x)
        x.copy_(torch.randn(100, 3000, device="cuda") * 3)
        graph.replay()
        torch.testing.assert_close(out, torch.softmax(x, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("served")
def test_in_a_compiled_graph() -> None:
    x = torch.randn(8, 500, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    whole = torch.compile(lambda t: fagen.softmax(t * 2, -1, torch.float32).square().sum(), fullgraph=True)
    (ours,) = torch.autograd.grad(whole(x), x)
    (wanted,) = torch.autograd.grad(torch.softmax(x * 2, -1, torch.float32).square().sum(), x)
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=1e-5)
