"""Dropout: which weights are dropped, by the definition; and the op, its gradient, and what PyTorch asks of both."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fagen
from fagen import api
from fagen.errors import InvalidArgument
from fagen.notices import FallbackWarning
from fagen.ops.attention import dropout, fallback, gradients, reference
from fagen.ops.attention.backward_call import BackwardCall
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import Problem

RNG = torch.tensor([0x0123456789ABCDEF, 0x7FEDCBA987654321], dtype=torch.int64)
RATE = 0.25


def kept(rate: float = RATE, rng: torch.Tensor = RNG, planes=(0, 2, 3), rows=range(130), keys=range(150)):
    return dropout.kept(rate, rng, planes, rows, keys)


def tensors(*, rows: int = 70, keys: int = 70, heads: int = 4, kv_heads: int = 2, dtype=torch.float32, grad=True):
    random = torch.Generator().manual_seed(1)
    shapes = ((2, rows, heads, 16), (2, keys, kv_heads, 16), (2, keys, kv_heads, 16))
    return [torch.randn(shape, generator=random, dtype=dtype, requires_grad=grad) for shape in shapes]


def seeded(function: Callable[..., Any], seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return function()


# ---- which weights --------------------------------------------------------------------------------------------------


def test_philox_is_the_published_one() -> None:
    """The known answers of Philox4x32-7: counter and key all zeros, and all ones."""
    for word, want in (
        (0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ):
        seed, counter = torch.tensor(-1 if word else 0), [torch.tensor(word)] * 4
        assert tuple(int(x) for x in dropout._philox(seed, *counter)) == want


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate(rate: float) -> None:
    cells = kept(rate, planes=(0, 4, 4), rows=range(512), keys=range(512)).float()
    deviation = (rate * (1 - rate) / cells.numel()) ** 0.5
    assert abs(cells.mean() - dropout.kept_of(rate) / 256) < 6 * deviation
    assert abs(1 - rate - dropout.kept_of(rate) / 256) <= 1 / 512
    for axis in range(4):  # of every head, row and key
        part = cells.movedim(axis, 0).flatten(1).mean(1)
        assert (part - cells.mean()).abs().max() < 7 * (rate * (1 - rate) / (cells.numel() / len(part))) ** 0.5


@pytest.mark.parametrize(
    ("rate", "want"), [(0.0, 256), (1e-30, 255), (0.001, 255), (0.1, 230), (0.5, 128), (0.9999, 1), (1.0, 0)]
)
def test_only_0_drops_nothing_and_only_1_all(rate: float, want: int) -> None:
    assert dropout.kept_of(rate) == want
    assert dropout.scale_of(rate) == (256 / want if want else 0)


def test_neighbours_and_heads_and_offsets_are_independent() -> None:
    cells = kept(0.5, planes=(0, 2, 3), rows=range(256), keys=range(256)).float() - 0.5
    others = [kept(0.5, RNG + torch.tensor(change), rows=range(256), keys=range(256)) for change in ((1, 0), (0, 1))]
    pairs = [(cells, other.float() - 0.5) for other in others]
    pairs += [(cells[:, 1:], cells[:, :-1]), (cells[1:], cells[:-1])]
    for step in (1, 2, 8, 16, 32):
        pairs += [(cells[..., step:, :], cells[..., :-step, :]), (cells[..., step:], cells[..., :-step])]
    for a, b in pairs:
        assert abs(float((a * b).mean())) * 4 < 6 / a.numel() ** 0.5


def test_a_part_is_that_of_the_whole() -> None:
    """Which head, row and key a weight is of decides alone."""
    whole = kept()
    assert torch.equal(kept(rows=range(17, 63), keys=range(9, 150)), whole[:, :, 17:63, 9:150])
    assert torch.equal(kept(planes=(3, 1, 3)), whole[1:])
    assert torch.equal(kept(planes=(4, 1, 1)), whole[1:, 1:2])


# ---- the definition -------------------------------------------------------------------------------------------------


def test_the_reference_drops_weights_and_not_the_lse() -> None:
    q, k, v = (t.double() for t in tensors(grad=False, kv_heads=4))
    call = AttentionCall.of(q, k, v, causal=True, dropout_p=RATE).with_rng(RNG)
    out, lse = reference.attend(call, call.bhsd(), reference.visible(call))
    plain = dataclasses.replace(call, dropout=0.0, rng=None)
    weights = (call.bhsd()[0] @ call.bhsd()[1].transpose(-1, -2) / 4).masked_fill(
        ~torch.ones(70, 70, dtype=torch.bool).tril(), -torch.inf
    ).softmax(-1)  # fmt: skip
    factors = kept(planes=(0, 2, 4), rows=range(70), keys=range(70)) * (256 / 192)
    torch.testing.assert_close(out, (weights * factors) @ call.bhsd()[2])
    torch.testing.assert_close(lse, reference.attend(plain, call.bhsd(), reference.visible(plain))[1])


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}, {"window": (9, 4)}])
def test_the_formula_of_the_gradients_is_their_definition(options: dict[str, Any]) -> None:
    q, k, v = tensors(rows=40, dtype=torch.float64, grad=False)
    forward = AttentionCall.of(q, k, v, **options, dropout_p=RATE).with_rng(RNG)
    out, lse = reference.attend(forward, forward.bhsd(), reference.visible(forward))
    dout, dlse = torch.randn_like(q), torch.randn_like(lse)
    call = BackwardCall.after(forward, out.transpose(1, 2), lse.float(), dout, dlse.float())
    want = gradients.gradients(call, torch.float64)
    for name, made in zip(want, gradients.by_rows(call), strict=True):
        torch.testing.assert_close(made.transpose(1, 2), want[name])


# ---- the op ---------------------------------------------------------------------------------------------------------

CALLS: dict[str, dict[str, Any]] = {
    "none": {}, "causal": {"causal": True}, "window": {"window": (20, 3)}, "softcap": {"softcap": 2.0, "causal": True},
    "lse": {"return_lse": True}, "sinks": {"sinks": torch.linspace(-1, 1, 4)},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_kernels_give_what_the_definition_says(name: str) -> None:
    how = CALLS[name]
    q, k, v = tensors()
    got = seeded(lambda: fagen.attention(q, k, v, **how, dropout_p=RATE))
    call = seeded(lambda: AttentionCall.of(q, k, v, **how, dropout_p=RATE).with_rng())
    want = fallback.attend(dataclasses.replace(call, want_lse=True))
    got, want = (got, want) if isinstance(got, tuple) else ((got,), want[:1])
    weights = [torch.randn_like(t) for t in want]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    found, wanted = (torch.autograd.grad(outputs, (q, k, v), weights) for outputs in (got, want))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_the_seed_decides() -> None:
    q, k, v = tensors(grad=False)
    one, other, again = (seeded(lambda: fagen.attention(q, k, v, dropout_p=RATE), seed) for seed in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(one, fagen.attention(q, k, v, dropout_p=RATE))
    assert not torch.equal(one, fagen.attention(q, k, v, dropout_p=RATE))  # the next call has another


def test_a_rate_of_0_is_none_and_one_of_1_drops_all() -> None:
    q, k, v = tensors(grad=False)
    before = torch.get_rng_state()
    assert torch.equal(fagen.attention(q, k, v, dropout_p=0.0), fagen.attention(q, k, v))
    assert torch.equal(torch.get_rng_state(), before)
    assert (fagen.attention(q, k, v, dropout_p=1.0) == 0).all()
    assert (torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=1.0) == 0).all()  # as PyTorch


def test_the_expectation_is_that_without() -> None:
    q, k, v = tensors(grad=False)
    torch.manual_seed(0)
    mean = sum(fagen.attention(q, k, v, dropout_p=0.1) for _ in range(200)) / 200
    torch.testing.assert_close(mean, fagen.attention(q, k, v), atol=0.1, rtol=0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "half"])
def test_what_is_no_rate_is_refused(value: Any) -> None:
    with pytest.raises((InvalidArgument, TypeError), match="dropout_p"):
        fagen.attention(*tensors(grad=False), dropout_p=value)


@pytest.mark.filterwarnings("ignore::fagen.notices.FallbackWarning")
def test_gradcheck() -> None:
    q, k, v = (t[:1, :7, :, :8].detach().requires_grad_() for t in tensors(dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda *qkv: seeded(lambda: fagen.attention(*qkv, causal=True, dropout_p=RATE)), (q, k, v)
    )


def test_opcheck() -> None:
    q, k, v = tensors(kv_heads=4)
    fagen.attention(q, k, v, dropout_p=RATE)  # which registers the ops
    call = AttentionCall.of(q, k, v, causal=True, dropout_p=RATE).with_rng(RNG)
    torch.library.opcheck(torch.ops.fagen.forward_lse.default, call.op_arguments())
    out, lse = (t.detach() for t in torch.ops.fagen.forward_lse(*call.op_arguments()))
    saved = (out, lse, torch.randn_like(out), None)
    without = [t.detach() if isinstance(t, torch.Tensor) else t for t in call.op_arguments()]
    torch.library.opcheck(torch.ops.fagen.backward.default, (*without, *saved))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    q, k, v = tensors()

    def attend(q: torch.Tensor) -> torch.Tensor:
        return fagen.attention(q, k, v, causal=True, dropout_p=RATE)

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    want, got = seeded(lambda: attend(q)), seeded(lambda: compiled(q))
    assert torch.equal(got, want)
    for mine, theirs in zip(*(torch.autograd.grad(t.sum(), (q, k, v)) for t in (got, want)), strict=True):
        assert torch.equal(mine, theirs)


def test_the_first_call_of_a_process_may_be_traced() -> None:
    code = (
        "import torch, fagen\n"
        "q = torch.randn(1, 8, 2, 16)\n"
        "attend = lambda q: fagen.attention(q, q, q, dropout_p=0.5)\n"
        "print(torch.compile(attend, fullgraph=True, backend='aot_eager')(q).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "[1, 8, 2, 16]" in done.stdout, done.stderr


def test_a_call_takes_the_fast_road(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Python between the caller and the kernels, forward and backward; the same numbers are drawn."""
    q, k, v = tensors()
    heads_first = [t.detach().transpose(1, 2) for t in (q, k, v)]
    roads = (
        lambda: fagen.attention(q, k, v, dropout_p=RATE),
        lambda: fagen.sdpa(*heads_first, dropout_p=RATE, enable_gqa=True).transpose(1, 2),
    )
    want = [seeded(road) for road in roads]
    assert api._fast is not None and torch.equal(*want)
    monkeypatch.setattr(api, "_attention", lambda call: pytest.fail("a slow road"))
    monkeypatch.setattr(AttentionCall, "of", lambda *a, **o: pytest.fail("validated in Python"))
    got = [seeded(road) for road in roads]
    assert all(map(torch.equal, got, want))
    for mine, theirs in zip(*(torch.autograd.grad(t[0].sum(), (q, k, v)) for t in (got, want)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)])
def test_empty_calls_have_gradients(shape: tuple[int, int, int]) -> None:
    batch, rows, keys = shape
    q, k, v = (torch.randn(batch, length, 2, 16, requires_grad=True) for length in (rows, keys, keys))
    out, lse = fagen.attention(q, k, v, dropout_p=RATE, return_lse=True)
    assert out.shape == q.shape and (out == 0).all()
    for t, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.shape == t.shape and (gradient == 0).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_the_same_mask(reentrant: bool) -> None:
    q, k, v = tensors()

    def attend(q: torch.Tensor) -> torch.Tensor:
        return fagen.attention(q, k, v, dropout_p=RATE)

    want = seeded(lambda: attend(q))
    got = seeded(lambda: checkpoint(attend, q, use_reentrant=reentrant))
    assert torch.equal(got, want)
    mine, theirs = (
        (torch.autograd.grad if not reentrant else _backward)(got.sum(), q),
        torch.autograd.grad(want.sum(), q),
    )
    assert torch.equal(mine[0], theirs[0])


def _backward(loss: torch.Tensor, leaf: torch.Tensor) -> tuple[torch.Tensor]:
    leaf.grad = None
    loss.backward()
    assert leaf.grad is not None
    return (leaf.grad,)


def test_a_second_derivative_is_refused_in_words() -> None:
    q, k, v = tensors()
    (dq,) = torch.autograd.grad(fagen.attention(q, k, v, dropout_p=RATE).sum(), q, create_graph=True)
    with pytest.raises(InvalidArgument, match="differentiated once"):
        dq.sum().backward()


def test_out_and_transforms() -> None:
    q, k, v = tensors(grad=False)
    want, room = seeded(lambda: fagen.attention(q, k, v, dropout_p=RATE)), torch.empty_like(q)
    assert seeded(lambda: fagen.attention(q, k, v, dropout_p=RATE, out=room)) is room
    assert torch.equal(room, want)
    with pytest.raises(InvalidArgument, match="shares memory"):
        fagen.attention(q, k, v, dropout_p=RATE, out=q)
    gradient = torch.func.grad(lambda q: seeded(lambda: fagen.attention(q, k, v, dropout_p=RATE)).sum())(q)
    assert gradient.shape == q.shape and gradient.abs().sum() > 0


def test_what_no_kernel_serves_drops_the_same() -> None:
    """float64 is PyTorch's: the mask is ours all the same."""
    q, k, v = tensors(grad=False)
    want = seeded(lambda: fagen.attention(q, k, v, dropout_p=RATE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        got = seeded(lambda: fagen.attention(q.double(), k.double(), v.double(), dropout_p=RATE))
    torch.testing.assert_close(got.float(), want)


def test_ops_refuse_what_is_no_seed() -> None:
    q, k, v = tensors(grad=False)
    fagen.attention(q, k, v, dropout_p=RATE)
    right = AttentionCall.of(q, k, v, dropout_p=RATE).with_rng(RNG).op_arguments()
    for rows in (70, 50):  # of another length the table knows what is left
        for rng in (RNG[:1], RNG.float(), RNG.repeat(2)[::2], RNG[0], RNG[None]):
            with pytest.raises(InvalidArgument, match="rng must be int64"):
                torch.ops.fagen.forward(*right._replace(q=q[:, :rows], rng=rng))
        with pytest.raises(InvalidArgument, match="rng"):
            torch.ops.fagen.forward(*right._replace(q=q[:, :rows], rng=None))
        for rate in (1.5, -0.5, float("nan")):
            with pytest.raises(InvalidArgument, match="dropout_p"):
                torch.ops.fagen.forward(*right._replace(q=q[:, :rows], dropout=rate))
        torch.ops.fagen.forward(*right)


# ---- the problem ----------------------------------------------------------------------------------------------------


def test_problems_without_dropout_are_named_and_written_as_before() -> None:
    for kind in (Problem, BackwardProblem):
        plain, dropping = kind(), kind(dropout=True)
        assert "dropout" not in plain.to_dict() and "dropout" not in plain.key
        assert kind.from_dict(plain.to_dict()) == plain and kind.from_dict(dropping.to_dict()) == dropping
        assert "/dropout" in dropping.static_key and dropping != plain
    call = AttentionCall.of(*tensors(grad=False), dropout_p=0.1)
    assert call.problem.dropout and not dataclasses.replace(call, dropout=0.0).problem.dropout
