"""Derivatives of every kind through `attention`, `flash_attn_func` and `sdpa`: PyTorch's, or an error; never zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import fagen
from fagen import api
from fagen.ops.attention import fallback, masks

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True, params=["ops", "ctypes"])
def _roads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("ignore", fallback.FallbackWarning)
    if request.param == "ctypes":
        monkeypatch.setattr(api, "_ops_ready", lambda: False)
        monkeypatch.setattr(api, "_fast", None)
        monkeypatch.setattr(api, "_fast_sdpa", None)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of bshd tensors, in products and sums that PyTorch can differentiate in every way."""
    k, v = (t.repeat_interleave(q.shape[-2] // t.shape[-2], -2) for t in (k, v))
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~masks.dense(q.shape[-3], k.shape[-3], window=(-1, 0))[0, 0], -torch.inf)
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


def by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return fagen.sdpa(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def same_bits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return fagen.flash_attn_func(q, k, v, causal=True, deterministic=True)


CALLS: dict[str, Attend] = {
    "attention": lambda q, k, v: fagen.attention(q, k, v, causal=True),
    "with lse": lambda q, k, v: fagen.attention(q, k, v, causal=True, return_lse=True)[0],
    "flash_attn_func": lambda q, k, v: fagen.flash_attn_func(q, k, v, causal=True),
    "deterministic": same_bits,
    "sdpa": by_sdpa,
}


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 5, heads, 16) for heads in (4, 2, 2)] + [(2, 5, 4, 16)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


q, k, v, tangent = inputs()
four = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]


def dual(f: Attend) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(q, tangent), k, v)))


def dual_values(f: Attend) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(q, k, forward_ad.make_dual(v, torch.ones_like(v)))))


def squared(f: Attend) -> Attend:
    return lambda q, k, v: f(q, k, v).square().sum()


def alone(f: Attend) -> Attend:
    """Of one sequence, without a batch."""
    return lambda q, k, v: f(q[None], k[None], v[None])


WAYS: dict[str, Callable[[Attend], Any]] = {
    "jvp": lambda f: jvp(f, (q, k, v), (tangent, torch.ones_like(k), torch.ones_like(v))),
    "jvp of k": lambda f: jvp(lambda k: f(q, k, v), (k,), (torch.ones_like(k),)),
    "dual": dual,
    "dual v": dual_values,
    "jacfwd": lambda f: jacfwd(lambda s: f(q * s, k, v))(four),
    "jacrev": lambda f: jacrev(lambda s: f(q * s, k, v))(four),
    "grad": lambda f: grad(squared(f), argnums=(0, 1, 2))(q, k, v),
    "hessian": lambda f: hessian(lambda s: squared(f)(q * s, k, v))(four),
    "jvp of grad": lambda f: jvp(lambda q: grad(squared(f))(q, k, v), (q,), (tangent,)),
    "vmap": lambda f: vmap(alone(f))(q, k, v),
    "vmap of q": lambda f: vmap(alone(f), in_dims=(0, None, None))(q, k[0], v[0]),
    "vmap of grad": lambda f: vmap(grad(squared(alone(f))))(q, k, v),
    "vmap of jvp": lambda f: vmap(lambda q, t: jvp(lambda q: alone(f)(q, k[0], v[0]), (q,), (t,)))(q, tangent),
    "jvp of vmap": lambda f: jvp(lambda q: vmap(alone(f))(q, k, v), (q,), (tangent,)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
def test_derivatives_are_those_of_plain_attention(call: str, way: str) -> None:
    got, want = (WAYS[way](f) for f in (CALLS[call], plain))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


def test_forward_derivatives_of_slopes_and_of_the_lse() -> None:
    def lse(slopes: torch.Tensor) -> torch.Tensor:
        return fagen.attention(q, k, v, alibi_slopes=slopes, return_lse=True)[1]

    slopes, step = torch.tensor([0.5, 0.25, 1.0, 0.1]), 1e-2
    _, slope = jvp(lse, (slopes,), (torch.ones(4),))
    apart = (lse(slopes + step) - lse(slopes - step)) / (2 * step)
    assert slope.abs().max() > 0.1
    torch.testing.assert_close(slope, apart, atol=1e-3, rtol=1e-3)


def test_a_kernel_serves_tensors_without_tangent_in_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    want = fagen.attention(q, k, v)
    monkeypatch.setattr(fallback, "attend", lambda *args, **options: pytest.fail("PyTorch computed"))
    with forward_ad.dual_level():
        assert torch.equal(fagen.attention(q, k, v), want)


class Names(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_deterministic_gradient_goes_without_pytorchs_own_attention(deterministic: bool) -> None:
    """On a GPU its backward adds up in any order. Of products of matrices each order is the same."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]  # for which we have no kernel
    with Names() as names:
        out = fagen.flash_attn_func(*leaves, causal=True, deterministic=deterministic)
        assert isinstance(out, torch.Tensor)
        out.square().sum().backward()
    assert any("scaled_dot_product" in name for name in names.seen) != deterministic
    assert not deterministic or not [n for n in names.seen if "index" in n or "scatter" in n or "atomic" in n]
    assert len(fagen.flash_attn_func(*leaves, deterministic=deterministic, return_attn_probs=True)) == 3


def test_autocast_does_not_change_what_attention_returns() -> None:
    """A kernel computes in the dtype that it is given; so does what stands in for it where a gradient is wanted."""
    leaf = q.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outs = [fagen.attention(leaf, k, v), *fagen.attention(leaf, k, v, return_lse=True)]
        outs.append(fagen.attention(q, k, v))
    assert {out.dtype for out in outs} == {torch.float32}
    torch.testing.assert_close(outs[0], outs[3], atol=1e-5, rtol=1e-5)
