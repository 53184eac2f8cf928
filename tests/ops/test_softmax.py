"""fagen.softmax and log_softmax as users call them, and the blocks of the online softmax: beside PyTorch."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

import fagen
from fagen import ops
from fagen.build import toolchain
from fagen.codegen import emit
from fagen.codegen.spec import KernelSpec
from fagen.dispatch import choose, known_softmax, resolve
from fagen.errors import FagenError, InvalidArgument, InvalidType
from fagen.families import cpu_softmax
from fagen.notices import FallbackWarning
from fagen.ops.softmax.call import fold
from fagen.ops.softmax.problem import SoftmaxProblem
from fagen.ops.softmax.stats import SoftmaxStats
from fagen.target import host
from tests.support.softmax import ROWS

pytestmark = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
inf = math.inf
PAIRS = ((fagen.softmax, torch.softmax), (fagen.log_softmax, torch.log_softmax))


def near(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.dtype == theirs.dtype and mine.is_contiguous()
    bound = 8 * torch.finfo(theirs.dtype).eps
    torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound, equal_nan=True)


# ---- values, gradients, dtypes, strides -----------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "log"), [(-1, False), (-1, True), (1, False), (0, False)])
def test_it_is_pytorchs_forward_and_backward(dim: int, log: bool) -> None:
    x = torch.randn(5, 70, 33, requires_grad=True)
    mine, theirs = (function(x, dim) for function in PAIRS[log])
    near(mine.detach(), theirs.detach())
    dout = torch.randn_like(mine)
    for gradient in (dout, dout.transpose(0, 2).contiguous().transpose(0, 2), torch.ones(()).expand_as(dout)):
        ours, wanted = (torch.autograd.grad(y, x, gradient, retain_graph=True)[0] for y in (mine, theirs))
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("log", [False, True])
def test_derivatives_of_derivatives(log: bool) -> None:
    x = torch.randn(3, 40, requires_grad=True)
    weights = torch.randn(3, 40)
    found = []
    for function in PAIRS[log]:
        (first,) = torch.autograd.grad((function(x, -1) * weights).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
        (third,) = torch.autograd.grad((second * weights).sum(), x)
        found.append((second.detach(), third))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_dtype_casts_on_the_way_in() -> None:
    x = torch.randn(6, 50).half().requires_grad_()
    mine, theirs = fagen.softmax(x, -1, torch.float32), torch.softmax(x, -1, torch.float32)
    near(mine.detach(), theirs.detach())
    dout = torch.randn(6, 50)
    ours, wanted = (torch.autograd.grad(y, x, dout)[0] for y in (mine, theirs))
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours, wanted, rtol=2e-3, atol=1e-6)
    large = torch.tensor([[1e6, 0.0, 70000.0]])  # infinite in fp16, as the cast comes first
    assert fagen.softmax(large, -1, torch.float16).isnan().all()
    near(fagen.softmax(torch.arange(9), -1, torch.float32), torch.softmax(torch.arange(9), -1, torch.float32))


def test_any_strides() -> None:
    base = torch.randn(8, 12, 40)
    cases = [
        base.transpose(0, 1), base[:, ::2], base[..., ::2], base[::2, 1:9, 3:30], base.permute(2, 0, 1),
        base[:, :1].expand(8, 5, 40), base[0, 0, 0], base[0, 0, 0:1], base.unsqueeze(1), base[:0], base[..., :0],
    ]  # fmt: skip
    for x in cases:
        for dim in {-1, 0, x.dim() // 2} if x.dim() else {-1, 0}:
            near(fagen.softmax(x, dim), torch.softmax(x, dim))
    view, along = fold(base.transpose(0, 1), 2)  # two levels of rows: no copy
    assert view.data_ptr() == base.data_ptr() and along == "row" and view.shape == (12, 8, 40)
    assert fold(base, 1)[0].data_ptr() == fold(base[:, 2:7], 1)[0].data_ptr() - 2 * 40 * 4 == base.data_ptr()


@pytest.mark.parametrize("function", range(2))
def test_rows_that_are_not_finite(function: int) -> None:
    ours, theirs = PAIRS[function]
    for row in ROWS.values():
        x = torch.tensor([row])
        near(ours(x), theirs(x, -1))
        if ours is fagen.softmax:
            near(ours(x.expand(3, -1).T.contiguous(), 0), theirs(x.expand(3, -1).T, 0).contiguous())


# ---- what is called, and what PyTorch does --------------------------------------------------------------------------


def _tangent(function: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent


def test_what_no_kernel_serves_is_pytorchs() -> None:
    x = torch.randn(3, 9, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match="no softmax kernel gives torch.float64"):
        near(fagen.softmax(x, 1), torch.softmax(x, 1))
    x = torch.randn(3, 9)
    with pytest.warns(FallbackWarning, match="transforms of torch.func"):
        mapped = torch.func.vmap(fagen.softmax)(x)
    near(mapped, torch.softmax(x, -1))
    with pytest.warns(FallbackWarning, match="forward-mode"):
        tangent = _tangent(fagen.log_softmax, x)
    assert tangent.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fagen.softmax([1.0, 2.0]), "x must be a tensor"),
        (lambda: fagen.softmax(torch.ones(2, 3), 2), "dim 2 is out of range"),
        (lambda: fagen.softmax(torch.ones(2, 3), -3), "x has 2 dimensions: -2 to 1"),
        (lambda: fagen.softmax(torch.ones(2, 3), None), "dim must be an integer"),
        (lambda: fagen.softmax(torch.ones(2, 3), True), "dim must be an integer"),
        (lambda: fagen.softmax(torch.ones(2, 3), -1, torch.int32), "dtype must be a floating dtype"),
        (lambda: fagen.softmax(torch.ones(2, 3), -1, ["fp16"]), "dtype must be a floating dtype"),
        (lambda: fagen.softmax(torch.arange(3)), "give dtype=torch.float32"),
        (lambda: torch.ops.fagen.softmax(torch.ones(2).double(), 0, False, torch.float32), "the op takes fp16"),
        (lambda: torch.ops.fagen.softmax(torch.ones(2), 0, False, torch.float16), "not torch.float32 to torch.float16"),
        (
            lambda: torch.ops.fagen.softmax_backward(torch.ones(3), torch.ones(2), 0, False, torch.float32),
            "a gradient must be like what it is of",
        ),
        (lambda: fagen.softmax_stats(torch.ones(3), 0, 0), "block: 0 is no integer from 1"),
        (lambda: fagen.softmax_stats(torch.ones(3, 0)), "no element along the dimension"),
        (lambda: fagen.softmax_stats(torch.ones(())), "no dimension to cut"),
        (lambda: fagen.softmax_stats(torch.arange(3)), "floating dtype"),
        (lambda: fagen.merge_stats(), "nothing to merge"),
        (lambda: fagen.merge_stats((torch.ones(2), torch.ones(3))), "differ in shape"),
        (lambda: fagen.merge_stats(torch.ones(2)), "stats are pairs"),
        (lambda: fagen.merge_stats(*(SoftmaxStats(t, t) for t in (torch.ones(2, 1), torch.ones(3, 1)))), "do not fit"),
    ],
)
def test_what_is_wrong_is_said(call: Any, words: str) -> None:
    with pytest.raises(FagenError) as caught:
        call()
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    assert isinstance(caught.value, InvalidArgument | InvalidType)


def test_a_call_like_one_before_only_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    known_softmax.forget()
    x = torch.randn(7, 30)
    first = fagen.softmax(x)
    seen: list[int] = []
    monkeypatch.setattr(torch.ops.fagen, "softmax", lambda *args: seen.append(1) or first)
    y = torch.randn(7, 30)
    near(fagen.softmax(y), torch.softmax(y, -1))
    assert not seen
    for other in (y[:, :29], y[:6], y.clone().requires_grad_(), torch.nn.Parameter(y), y.bfloat16()):
        fagen.softmax(other)
    assert len(seen) == 5, "another shape, stride, dtype, or a derivative asks again"
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert known_softmax.find(y, -1, None, False) is None
    with torch.device("cpu"):  # a mode of functions
        fagen.softmax(y)
    assert len(seen) == 6, "a mode sees the op"
    monkeypatch.undo()
    resolve.renew()
    assert known_softmax.find(x, -1, None, False) is None, "dispatch may choose otherwise now"
    fagen.softmax(x)
    assert known_softmax.find(x, -1, None, False) is not None
    known_softmax.forget()
    assert known_softmax.find(x, -1, None, False) is None


def test_gradients_like_some_before_only_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(x: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(fagen.softmax(x), x, dout)[0]

    known_softmax.forget()
    gradient(torch.randn(7, 30), torch.randn(7, 30))
    asked: list[SoftmaxProblem] = []
    kernel_for = resolve.kernel_for
    monkeypatch.setattr(resolve, "kernel_for", lambda p, where: asked.append(p) or kernel_for(p, where))
    x, dout = torch.randn(7, 30), torch.randn(7, 30)
    ours = gradient(x, dout)
    assert not asked
    turned = gradient(x, dout.T.contiguous().T)
    assert [p.direction for p in asked] == ["backward"], "a gradient of other strides asks again"
    y = torch.softmax(x, -1)
    for made in (ours, turned):
        torch.testing.assert_close(made, y * (dout - (y * dout).sum(-1, keepdim=True)), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_opcheck() -> None:
    x = torch.randn(3, 7)
    for args in ((x.clone().requires_grad_(), 1, False, torch.float32), (x.half(), 0, True, torch.float32)):
        torch.library.opcheck(torch.ops.fagen.softmax, args)
    dout, y = (torch.randn(3, 7, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.fagen.softmax_backward, (dout, y, 1, False, torch.float32))


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    def loss(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (fagen.log_softmax(x * 2, dim=-1, dtype=torch.float32) * weights).sum() + fagen.softmax(
            x, 1
        ).float().sum()

    x, weights = torch.randn(2, 5, 40).half().requires_grad_(), torch.randn(2, 5, 40)
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    near(whole(x, weights).detach(), loss(x, weights).detach())
    ours, wanted = (torch.autograd.grad(f(x, weights), x)[0] for f in (whole, loss))
    torch.testing.assert_close(ours, wanted)


# ---- the road -------------------------------------------------------------------------------------------------------


def test_a_problem_from_outside_is_validated() -> None:
    good = SoftmaxProblem("softmax", "backward", "fp32", "bf16", True, "column", 2, 3, 4)
    assert ops.problem_from(good.to_dict()) == good and ops.is_problem(good)
    assert good.key == "softmax/backward/fp32-bf16/column/log/b2/r3-c4" and (good.length, good.count) == (3, 8)
    assert SoftmaxProblem(dtype="bf16") == SoftmaxProblem(dtype="bf16", out_dtype="bf16")
    hostile: list[dict[str, Any]] = [
        {"dtype": "fp64"}, {"dtype": ["fp32"]}, {"along": "diagonal"}, {"direction": ""}, {"rows": 0},
        {"columns": 2**31}, {"batch": True}, {"log": 1}, {"out_dtype": "fp16"}, {"dtype": "fp16", "out_dtype": "bf16"},
        {"out_dtype": None},
        {"direction": "backward", "dtype": "fp16", "out_dtype": "fp32"}, {"evil": 1}, {"op": "forward"},
    ]  # fmt: skip
    for fields in hostile:
        with pytest.raises(InvalidArgument):
            SoftmaxProblem.from_dict({**SoftmaxProblem().to_dict(), "out_dtype": "", **fields})


def test_dispatch_and_emit(folders, tmp_path) -> None:
    problem = SoftmaxProblem(rows=5, columns=77)
    choice = choose.choose(problem, host())
    assert choice.provenance == "default" and choice.spec is not None and choice.spec.family is cpu_softmax.FAMILY
    emit.write(KernelSpec(cpu_softmax.FAMILY, problem, host(), choice.spec.config), "by hand", tmp_path / "made")
    text = (tmp_path / "made" / "kernel.h").read_text()
    assert "fagen_softmax_params" in text and "softmax for softmax/forward/fp32/row" in text


# ---- blocks and their merge -----------------------------------------------------------------------------------------


def whole(x: torch.Tensor, dim: int) -> SoftmaxStats:
    return fagen.softmax_stats(x, dim)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_split_merges_to_the_same(dim: int) -> None:
    x = torch.randn(6, 31, 45, dtype=torch.float64) * 30
    x[0, 0], x[:, 3, 7] = -inf, -inf
    want = whole(x, dim)
    torch.testing.assert_close(want.logsumexp.squeeze(dim), x.logsumexp(dim))
    chance = random.Random(dim)
    for _ in range(20):
        length, count = x.shape[dim], chance.randint(1, 6)
        cuts = sorted(chance.randint(0, length) for _ in range(count))
        pieces = [p for p in torch.tensor_split(x, cuts, dim) if p.shape[dim]]
        parts = [fagen.softmax_stats(p, dim, chance.choice([None, 1, 4, 1000])) for p in pieces]
        chance.shuffle(parts)
        half = chance.randint(0, len(parts))
        groups = [fagen.merge_stats(*some, dim=dim) for some in (parts[:half], parts[half:]) if some]
        merged = fagen.merge_stats(*groups, dim=dim)
        assert torch.equal(merged.max, want.max)
        torch.testing.assert_close(merged.sum, want.sum, rtol=1e-13, atol=0)
    blocks = fagen.softmax_stats(x, dim, 4)
    assert blocks.max.shape[dim] == -(-x.shape[dim] // 4)


def test_blocks_that_are_not_finite() -> None:
    nothing = fagen.softmax_stats(torch.full((3,), -inf))
    assert nothing.max == -inf and nothing.sum == 0 and nothing.logsumexp == -inf
    some = fagen.softmax_stats(torch.tensor([1.0, 2.0]))
    assert all(torch.equal(a, b) for a, b in zip(fagen.merge_stats(nothing, some), some, strict=True))
    for bad in (inf, math.nan):
        spoilt = fagen.merge_stats(some, fagen.softmax_stats(torch.tensor([bad, 0.0])), nothing)
        assert spoilt.sum.isnan()


def test_what_is_made_of_stats_has_the_right_gradient() -> None:
    x = torch.randn(4, 50, requires_grad=True)
    stats = fagen.merge_stats(fagen.softmax_stats(x, -1, 8))
    mine, theirs = (x - stats.max).exp() / stats.sum, torch.softmax(x, -1)
    dout = torch.randn(4, 50)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dout, retain_graph=True)[0] for y in (mine, theirs)))
    torch.testing.assert_close(torch.autograd.grad(stats.logsumexp.sum(), x)[0], theirs.detach())
    assert fagen.softmax_stats(torch.ones(3, dtype=torch.bfloat16)).sum.dtype == torch.float32
