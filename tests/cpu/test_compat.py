"""The signatures of others, torch.compile, and torch's own checks of an op."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fagen
from fagen import binding, fallback, verify
from fagen.errors import UnsupportedProblem
from fagen.verify import Semantics

F = torch.nn.functional


@pytest.fixture(autouse=True)
def _reasons_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_warned", set())


def bhsd(sq: int = 33, sk: int = 47, h: int = 4, hk: int = 4, d: int = 16) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, h, sq, d), torch.randn(2, hk, sk, d), torch.randn(2, hk, sk, d)


# ---- flash_attn_func ----------------------------------------------------------------------------------------------


def test_flash_attn_signature_is_theirs() -> None:
    want = (
        "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    )
    parameters = inspect.signature(fagen.flash_attn_func).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == want


def test_flash_attn_func() -> None:
    q, k, v = (t.transpose(1, 2) for t in bhsd(hk=2))
    out, lse, nothing = fagen.flash_attn_func(q, k, v, 0.0, 0.3, True, (9, -1), 2.0, None, True, True)
    assert nothing is None
    assert verify.check(out, lse, q, k, v, Semantics((9, 0), "", 2.0, 0.3), layout="bshd")
    assert verify.check(fagen.flash_attn_func(q, k, v), None, q, k, v, Semantics(), layout="bshd")


def test_flash_attn_dropout_is_refused() -> None:
    q, k, v = (t.transpose(1, 2) for t in bhsd())
    with pytest.raises(UnsupportedProblem, match="dropout_p=0.1") as caught:
        fagen.flash_attn_func(q, k, v, 0.1)
    assert isinstance(caught.value, NotImplementedError)


# ---- sdpa ---------------------------------------------------------------------------------------------------------


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.sampled_from([None, 0.2]))
def test_sdpa_is_pytorchs_causal_top_left(sq: int, sk: int, causal: bool, scale: float | None) -> None:
    q, k, v = bhsd(sq, sk)
    same(
        fagen.sdpa(q, k, v, is_causal=causal, scale=scale),
        F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale),
    )


def test_sdpa_shares_heads_when_asked() -> None:
    q, k, v = bhsd(hk=2)
    same(fagen.sdpa(q, k, v, enable_gqa=True), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    with pytest.raises(RuntimeError), pytest.warns(fallback.FallbackWarning, match="broadcast"):
        fagen.sdpa(q, k, v)


@pytest.mark.parametrize("mask", [torch.rand(33, 47) > 0.3, torch.randn(33, 47)])
def test_sdpa_mask_tensors_go_to_pytorch(mask: torch.Tensor) -> None:
    q, k, v = bhsd()
    with pytest.warns(fallback.FallbackWarning, match="mask tensor"):
        got = fagen.sdpa(q, k, v, mask)
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, mask))


def test_sdpa_other_ranks_and_dropout_go_to_pytorch() -> None:
    q = torch.randn(7, 5, 16)
    with pytest.warns(fallback.FallbackWarning, match="4 dimensions"):
        same(fagen.sdpa(q, q, q), F.scaled_dot_product_attention(q, q, q))
    with pytest.warns(fallback.FallbackWarning, match="dropout"):
        assert fagen.sdpa(*bhsd(), dropout_p=0.5).shape == (2, 4, 33, 16)


# ---- torch's own checks -------------------------------------------------------------------------------------------

PLAIN = (None, None, True, True, -1, -1, 0.0, None)


@pytest.fixture(scope="module")
def ops() -> object:
    assert binding.load() is not None
    return torch.ops.fagen


@pytest.mark.slow
@pytest.mark.parametrize(("name", "grad"), [("forward", False), ("forward_lse", True)])
def test_opcheck(ops, name: str, grad: bool) -> None:  # noqa: ANN001
    op = getattr(ops, name).default
    q, k, v = (t.requires_grad_(grad) for t in bhsd())
    torch.library.opcheck(op, (q, k, v, *PLAIN))
    intervals = torch.full((1, 1, 47, 1), 33, dtype=torch.int32)
    torch.library.opcheck(op, (q, k, v, intervals, torch.rand(4), True, False, 5, -1, 2.0, 0.3))


@pytest.mark.parametrize("want_lse", [False, True])
def test_opcheck_out(ops, want_lse: bool) -> None:  # noqa: ANN001
    torch.library.opcheck(ops.forward_out.default, (*bhsd(), *PLAIN, want_lse, torch.empty(2, 4, 33, 16)))


def several(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    intervals = torch.full((1, 1, k.shape[2], 2), 0, dtype=torch.int32)
    intervals[..., 0] = q.shape[2]
    out, lse = fagen.attention(q, k, v, layout="bhsd", window=(8, None), return_lse=True)
    return [
        fagen.attention(q * 2, k, v, layout="bhsd", causal=True) + 1,
        out,
        lse,
        fagen.attention(q, k, v, layout="bhsd", intervals=intervals, softcap=2.0, scale=0.3),
        fagen.sdpa(q, k, v, is_causal=True),
        fagen.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
    ]


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_without_a_break(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(several, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sq, sk in ((33, 47), (40, 40)):
        inputs = bhsd(sq, sk)
        with torch.no_grad():
            for got, want in zip(compiled(*inputs), several(*inputs), strict=True):
                same(got, want)


def test_torch_compile_with_gradients() -> None:
    torch._dynamo.reset()
    inputs = [t.requires_grad_() for t in bhsd()]

    def causal(*tensors: torch.Tensor) -> torch.Tensor:
        return fagen.attention(*tensors, layout="bhsd", causal=True)

    compiled = torch.compile(causal, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(compiled(*inputs).square().sum(), inputs)]
    with pytest.warns(fallback.FallbackWarning, match="gradients"):
        grads.append(torch.autograd.grad(causal(*inputs).square().sum(), inputs))
    for got, want in zip(*grads, strict=True):
        same(got, want)


def test_torch_compile_mutates_out() -> None:
    torch._dynamo.reset()
    q, k, v = bhsd()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def into(out: torch.Tensor) -> torch.Tensor:
        fagen.attention(q, k, v, layout="bhsd", out=out)
        return out * 2

    out = torch.empty(2, 4, 33, 16)
    with torch.no_grad():
        doubled = into(out)
    assert verify.check(out, None, q, k, v, Semantics()) and torch.equal(doubled, out * 2)


def test_other_modes_see_the_op() -> None:
    """Dispatch modes and function modes are not passed by on the short way."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    q, k, v = bhsd()
    fagen.attention(q, k, v, layout="bhsd")
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in (Dispatch, Function):
        seen.clear()
        with mode():
            fagen.attention(q, k, v, layout="bhsd")
        assert any("fagen.forward" in name for name in seen), seen
