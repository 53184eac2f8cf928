"""Gradients through `fagen.attention` on the CPU: a kernel's, in every way that people ask for them."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fagen
from fagen import api
from fagen.errors import InvalidArgument
from fagen.ops.attention import fallback, reference
from fagen.runtime import binding
from tests.support.calls import Case, example

pytestmark = pytest.mark.skipif(binding.load() is None, reason="no C++ binding")


@pytest.fixture(autouse=True)
def _only_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch may not compute in our place, unless a test says so."""
    api._ops_ready()
    if "by_torch" in request.keywords:
        warnings.simplefilter("ignore", fallback.FallbackWarning)
    else:
        monkeypatch.setattr(fallback, "attend", lambda *_, **__: pytest.fail("PyTorch computed the output"))
        monkeypatch.setattr(fallback, "gradients", lambda *_, **__: pytest.fail("PyTorch computed the gradients"))


def leaves(case: Case) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in (case.q, case.k, case.v)]


def definition(case: Case, dout: torch.Tensor, dlse: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The gradients of the definition, in float64."""
    wide = [t.detach().double().requires_grad_() for t in (case.q, case.k, case.v)]
    call = dataclasses.replace(case.call(), q=wide[0], k=wide[1], v=wide[2])
    out, lse = reference.attend(call, call.bhsd(), reference.visible(call))
    out = out if call.layout == "bhsd" else out.transpose(1, 2)
    made, wanted = [out], [dout.double()]
    if dlse is not None:
        made, wanted = [out, lse], [dout.double(), dlse.double()]
    return list(torch.autograd.grad(made, wide, wanted))


def close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    for name, mine, exact in zip("qkv", got, want, strict=True):
        torch.testing.assert_close(
            mine.double(), exact, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"d{n}: {m}"
        )


def random_like(t: torch.Tensor) -> torch.Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(9), dtype=t.dtype)


CASES: dict[str, Case] = {
    "plain": example(),
    "causal": example(causal=True),
    "causal, more rows than keys": example(sq=50, sk=20, causal=True),
    "window": example(window=(9, 3)),
    "intervals": example(
        intervals=torch.randint(0, 34, (2, 2, 47, 1), dtype=torch.int32, generator=torch.Generator().manual_seed(5))
    ),
    "softcap": example(softcap=2.0),
    "alibi": example(alibi_slopes=torch.tensor([0.5, 0.1, 0.2, 1.0]), causal=True),
    "scale": example(scale=0.7),
    "one head of keys": example(hk=1),
    "heads before rows": example(layout="bhsd", b=2, sq=4, sk=4, h=33, hk=11),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    case, inputs = CASES[name], leaves(CASES[name])
    out = fagen.attention(*inputs, **case.options)
    dout = random_like(out)
    out.backward(dout)
    close([t.grad for t in inputs], definition(case, dout))


def test_the_gradient_of_the_lse_counts() -> None:
    case = example(causal=True, sk=33)
    inputs = leaves(case)
    out, lse = fagen.attention(*inputs, return_lse=True, **case.options)
    dout, dlse = random_like(out), random_like(lse)
    torch.autograd.backward([out, lse], [dout, dlse])
    close([t.grad for t in inputs], definition(case, dout, dlse))


def test_a_gradient_of_the_lse_alone() -> None:
    case = example()
    inputs = leaves(case)
    _, lse = fagen.attention(*inputs, return_lse=True)
    lse.backward(torch.ones_like(lse))
    close([t.grad for t in inputs], definition(case, torch.zeros_like(case.q), torch.ones_like(lse)))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_want_no_gradient(wanted: tuple[int, ...]) -> None:
    case = example()
    tensors = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((case.q, case.k, case.v))]
    out = fagen.attention(*tensors)
    dout = random_like(out)
    out.backward(dout)
    exact = definition(case, dout)
    for i, t in enumerate(tensors):
        assert (t.grad is not None) == (i in wanted)
        if t.grad is not None:
            torch.testing.assert_close(t.grad.double(), exact[i], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("how", ["sum", "transposed", "every other", "unaligned"])
def test_an_upstream_gradient_of_any_strides(how: str) -> None:
    case = example()
    inputs = leaves(case)
    out = fagen.attention(*inputs)
    if how == "sum":
        out.sum().backward()  # expanded from one number
        dout = torch.ones_like(out)
    else:
        make = {
            "transposed": lambda: torch.randn(16, 4, 33, 2).permute(3, 2, 1, 0),
            "every other": lambda: torch.randn(2, 33, 4, 32)[..., ::2],
            "unaligned": lambda: torch.randn(2, 33, 4, 17)[..., 1:],
        }
        dout = make[how]()
        out.backward(dout)
    close([t.grad for t in inputs], definition(case, dout))


def test_into_views_of_one_projection() -> None:
    """q, k and v are slices of one tensor, as most models make them."""
    packed = torch.randn(2, 33, 3, 4, 16, requires_grad=True)
    case = Case(*(t.detach().clone() for t in packed.unbind(2)), {"causal": True})
    out = fagen.attention(*packed.unbind(2), causal=True)
    dout = random_like(out)
    out.backward(dout)
    assert packed.grad is not None
    close(packed.grad.unbind(2), definition(case, dout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_as_good_as_pytorch(dtype: torch.dtype) -> None:
    case = example(b=1, sq=128, sk=128, causal=True)
    case = Case(case.q.to(dtype), case.k.to(dtype), case.v.to(dtype), case.options)
    mine, theirs = leaves(case), leaves(case)
    out = fagen.attention(*mine, **case.options)
    dout = random_like(out)
    out.backward(dout)
    call = dataclasses.replace(case.call(), q=theirs[0], k=theirs[1], v=theirs[2])
    low, _ = reference.attend(call, call.bhsd(), reference.visible(call))
    low.transpose(1, 2).backward(dout)
    for a, b, exact in zip(mine, theirs, definition(case, dout), strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.dtype == dtype
        assert (a.grad - exact).abs().max() <= 3 * (b.grad - exact).abs().max() + 1e-3


def test_sdpa_and_flash_attn_func() -> None:
    case = example(sk=33, causal=True, d=32)
    for call in (
        lambda q, k, v: fagen.flash_attn_func(q, k, v, causal=True),
        lambda q, k, v: fagen.flash_attn_func(q, k, v, causal=True, deterministic=True),
        lambda q, k, v: fagen.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[0],
        lambda q, k, v: fagen.sdpa(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2),
    ):
        inputs = leaves(case)
        out = call(*inputs)
        dout = random_like(out)
        out.backward(dout)
        close([t.grad for t in inputs], definition(case, dout))


# ---- what surrounds a call ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    case = example(causal=True)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fagen.attention(q * 1.5, k, v, causal=True).square().sum()

    inputs, plain = leaves(case), leaves(case)
    loss(*inputs).backward()
    fagen.attention(plain[0] * 1.5, plain[1], plain[2], causal=True).square().sum().backward()
    close([t.grad for t in inputs], [t.grad.double() for t in plain if t.grad is not None], 1e-6)


@pytest.mark.slow
def test_opcheck() -> None:
    q, k, v = leaves(example(causal=True))
    arguments = (q, k, v, None, None, False, True, -1, 0, 0.0, None, False, 0.0, None)
    torch.library.opcheck(torch.ops.fagen.forward.default, arguments)
    torch.library.opcheck(torch.ops.fagen.forward_lse.default, arguments)
    out, lse = torch.ops.fagen.forward_lse(*(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments))
    inputs = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(torch.ops.fagen.backward.default, (*inputs, out, lse, torch.ones_like(out), None))


def test_checkpointing_gives_the_same() -> None:
    case = example(causal=True)
    plain, kept = leaves(case), leaves(case)
    fagen.attention(*plain, causal=True).square().sum().backward()
    again = checkpoint(lambda *t: fagen.attention(*t, causal=True), *kept, use_reentrant=False)
    again.square().sum().backward()
    for a, b in zip(plain, kept, strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_an_input_that_was_overwritten_is_noticed() -> None:
    q, k, v = (t * 1 for t in leaves(example()))
    out = fagen.attention(q, k, v)
    k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_refused_in_words() -> None:
    q, k, v = leaves(example())
    (dq,) = torch.autograd.grad(fagen.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(InvalidArgument, match="differentiated once"):
        dq.sum().backward()


def test_a_graph_is_freed_after_its_gradient() -> None:
    inputs = leaves(example())
    out = fagen.attention(*inputs)
    out.sum().backward(retain_graph=True)
    once = [t.grad.clone() for t in inputs if t.grad is not None]
    out.sum().backward()
    for t, first in zip(inputs, once, strict=True):
        assert t.grad is not None
        torch.testing.assert_close(t.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


@pytest.mark.parametrize("way", ["argument", "global"])
def test_deterministic_gradients_repeat_in_every_bit(way: str) -> None:
    case = example(b=2, sq=150, sk=150, causal=True)

    def once() -> list[torch.Tensor]:
        inputs = leaves(case)
        out = fagen.attention(*inputs, causal=True, deterministic=way == "argument")
        out.square().sum().backward()
        return [t.grad for t in inputs if t.grad is not None]

    torch.use_deterministic_algorithms(way == "global")
    try:
        first = once()
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_under_autocast_and_no_grad() -> None:
    inputs = leaves(example())
    with torch.no_grad():
        assert not fagen.attention(*inputs).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = (functional.linear(t, torch.eye(16)) for t in inputs)
        out = fagen.attention(q, k, v)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in inputs)


def test_a_step_of_training_learns() -> None:
    torch.manual_seed(0)
    project, target = torch.nn.Linear(16, 48), torch.randn(2, 20, 1, 16)
    x = torch.randn(2, 20, 1, 16)
    optimizer = torch.optim.SGD(project.parameters(), lr=0.5)
    losses = []
    for _ in range(20):
        out = fagen.attention(*project(x).chunk(3, dim=-1), causal=True)
        loss = functional.mse_loss(out, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


# ---- what PyTorch does in our place ---------------------------------------------------------------------------------


@pytest.mark.by_torch
def test_an_empty_batch_has_gradients() -> None:
    inputs = leaves(example(b=0))
    fagen.attention(*inputs).sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in inputs)


@pytest.mark.by_torch
@pytest.mark.parametrize("what", ["float64", "slopes"])
def test_what_no_kernel_serves_is_still_right(what: str) -> None:
    case = example()
    dtype = torch.float64 if what == "float64" else torch.float32
    inputs = [t.to(dtype).requires_grad_() for t in (case.q, case.k, case.v)]
    slopes = torch.rand(4, requires_grad=True) if what == "slopes" else None
    out = fagen.attention(*inputs, alibi_slopes=slopes)
    dout = random_like(out)
    out.backward(dout)
    exact = definition(
        Case(case.q, case.k, case.v, {"alibi_slopes": slopes.detach()} if slopes is not None else {}), dout
    )
    close([t.grad for t in inputs], exact)
    assert slopes is None or (slopes.grad is not None and slopes.grad.abs().min() > 0)


@pytest.mark.by_torch
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("want_lse", [False, True])
def test_the_op_by_itself_has_pytorch_stand_in(layout: str, want_lse: bool) -> None:
    """As when a compiled graph meets a call without a kernel: strides are then those that its tracer was told of."""
    case = example(layout=layout, sq=33, sk=33, h=4, hk=4) if layout == "bshd" else example(
        layout=layout, sq=4, sk=4, h=33, hk=33
    )  # fmt: skip
    inputs = [t.double() for t in (case.q, case.k, case.v)]
    arguments = (*inputs, None, None, layout == "bhsd", False, -1, -1, 0.0, None, False, 0.0, None)
    out, lse = torch.ops.fagen.forward_lse(*arguments)
    dout, dlse = random_like(out), random_like(lse) if want_lse else None
    got = torch.ops.fagen.backward(*arguments, out, lse, dout, dlse)
    close(got, definition(case, dout, dlse))
    assert [t.stride() for t in got] == [t.stride() for t in inputs]
    assert not any(t.requires_grad for t in got)


@pytest.mark.slow
@pytest.mark.by_torch
def test_a_compiled_graph_has_pytorch_stand_in() -> None:
    case = example(d=264, causal=True)  # beyond the head dims of all kernels

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fagen.attention(q, k, v, causal=True).square().sum()

    inputs, plain = leaves(case), leaves(case)
    loss(*inputs).backward()
    fagen.attention(*plain, causal=True).square().sum().backward()
    for a, b in zip(inputs, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.by_torch
def test_the_op_by_itself_refuses_what_it_did_not_make() -> None:
    q, k, v = example().q, example().k, example().v
    arguments = (q, k, v, None, None, False, False, -1, -1, 0.0, None, False, 0.0, None)
    out, lse = torch.ops.fagen.forward_lse(*arguments)
    for bad in (
        (out[:, :-1], lse, out, None), (out, lse[..., :-1], out, None), (out, lse, out.double(), None),
        (out, lse.double(), out, None), (out, lse, out, lse[:1]),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument):
            torch.ops.fagen.backward(*arguments, *bad)
