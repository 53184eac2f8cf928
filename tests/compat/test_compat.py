"""The signatures of others, torch.compile, and torch's own checks of an op."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fagen
from fagen import api
from fagen.ops.attention import fallback
from fagen.runtime import binding
from tests.support.calls import right

F = torch.nn.functional


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
    assert right((out, lse), q, k, v, causal=True, window=(9, None), softcap=2.0, scale=0.3)
    assert right(fagen.flash_attn_func(q, k, v), q, k, v)


def test_flash_attn_dropout() -> None:
    q, k, v = (t.transpose(1, 2) for t in bhsd())
    torch.manual_seed(1)
    got, lse, _ = fagen.flash_attn_func(q, k, v, 0.1, causal=True, return_attn_probs=True)
    torch.manual_seed(1)
    want = fagen.attention(q, k, v, causal=True, dropout_p=0.1)
    assert torch.equal(got, want) and not torch.equal(got, fagen.attention(q, k, v, causal=True))
    torch.testing.assert_close(lse, fagen.attention(q, k, v, causal=True, return_lse=True)[1])


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


Made = tuple[list[torch.Tensor], dict]


@st.composite
def sdpa_calls(draw: st.DrawFn) -> Made:
    """Sizes that may be zero, layouts, dtypes, masks: what PyTorch's own takes, and some that it does not."""
    b, hk, sq, sk, d, dv = (
        draw(st.sampled_from(some)) for some in ([1, 2, 0], [1, 2, 0], [3, 1, 0], [5, 3, 0], [16, 0], [16, 24, 0])
    )
    group = draw(st.sampled_from([1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tensors = []
    for heads, rows, size in ((group * hk, sq, d), (hk, sk, d), (hk, sk, dv)):
        order = draw(st.sampled_from([(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)]))
        sizes = (b, heads, rows, size)
        stored = torch.randn(*(sizes[i] for i in order), size, generator=generator)
        tensors.append(stored.permute(*(order.index(i) for i in range(3)), 3))
    options: dict = {"enable_gqa": group > 1 or draw(st.booleans()), "scale": draw(st.sampled_from([None, 0.2]))}
    kind = draw(st.sampled_from(["none", "causal", "bool", "float", "row"]))
    options["is_causal"] = kind == "causal"
    if kind in ("bool", "float"):
        mask = torch.randn(sq, sk, generator=generator)
        options["attn_mask"] = mask > -1 if kind == "bool" else mask
    elif kind == "row":
        options["attn_mask"] = torch.randn(b, 1, 1, sk, generator=generator)
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    return [t.to(dtype) for t in tensors], options


@pytest.mark.filterwarnings("ignore::fagen.ops.attention.fallback.FallbackWarning")
@settings(max_examples=250, deadline=None)
@given(made=sdpa_calls())
def test_sdpa_answers_as_pytorchs(made: Made) -> None:
    tensors, options = made
    want = F.scaled_dot_product_attention(*tensors, **options)
    got = fagen.sdpa(*tensors, **options)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if tensors[0].dtype == torch.bfloat16:
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    else:
        same(got, want)


ORDERS = {
    "bhsd": (0, 1, 2),
    "bshd": (0, 2, 1),
    "sbhd": (2, 0, 1),
    "hbsd": (1, 0, 2),
    "hsbd": (1, 2, 0),
    "shbd": (2, 1, 0),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("road", ["ops", "ctypes"])
def test_sdpa_keeps_the_querys_layout(order: str, causal: bool, road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what follows may view it as PyTorch's own: back in the query's order it is contiguous."""
    if road == "ctypes":
        monkeypatch.setattr(api, "_ops_ready", lambda: False)
        monkeypatch.setattr(api, "_fast", None)
        monkeypatch.setattr(api, "_fast_sdpa", None)
    back = ORDERS[order]
    sizes = (2, 4, 33, 16)
    q = torch.randn(*(sizes[i] for i in back), 16).permute(*(back.index(i) for i in range(3)), 3)
    k, v = torch.randn(2, 4, 33, 16), torch.randn(2, 4, 33, 24)
    for values in (v[..., :16], v):
        out = fagen.sdpa(q, k, values, is_causal=causal)
        assert out.permute(*back, 3).is_contiguous()
        same(out, F.scaled_dot_product_attention(q, k, values, is_causal=causal))
    if order == "bshd":
        assert fagen.sdpa(q, k, k).transpose(1, 2).view(2, 33, 64).shape == (2, 33, 64)
    packed = torch.randn(2, 33, 3, 4, 16).unbind(2)  # no view of which is contiguous
    assert fagen.sdpa(*(t.transpose(1, 2) for t in packed)).transpose(1, 2).is_contiguous()
    assert fagen.sdpa(q[:1, :1].expand(2, 4, 33, 16), k, k).shape == (2, 4, 33, 16)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_sdpa_obeys_autocast(kind: torch.dtype) -> None:
    q, k, v = bhsd()
    mixed = (q, k.half(), v.bfloat16())
    with torch.autocast("cpu", kind), warnings.catch_warnings():
        warnings.simplefilter("ignore", fallback.FallbackWarning)  # float16 is for PyTorch, on a CPU
        got, want = fagen.sdpa(*mixed), F.scaled_dot_product_attention(*mixed)
        assert got.dtype == want.dtype == kind
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
        doubles = [t.double() for t in (q, k, v)]
        assert fagen.sdpa(*doubles).dtype == F.scaled_dot_product_attention(*doubles).dtype == torch.float64
        for odd in ((q.double(), k, v), (q.int(), k, v)):
            for call in (fagen.sdpa, F.scaled_dot_product_attention):
                with pytest.raises(RuntimeError):
                    call(*odd)


ODD: list[tuple[type[Exception], dict]] = [
    (RuntimeError, {"key": lambda t: t.double()}),
    (RuntimeError, {"key": lambda t: t[..., :8]}),
    (RuntimeError, {"value": lambda t: t.to("meta")}),
    (RuntimeError, {"query": lambda t: t.int()}),
    (RuntimeError, {"query": lambda t: t.to_sparse()}),
    (
        RuntimeError,
        {"query": lambda t: t[:, :3], "enable_gqa": True, "key": lambda t: t[:, :2], "value": lambda t: t[:, :2]},
    ),
    (RuntimeError, {"dropout_p": -1.0}),
    (RuntimeError, {"dropout_p": 2.0}),
    (RuntimeError, {"dropout_p": math.nan}),
    (RuntimeError, {"attn_mask": torch.ones(3, 3)}),
    (TypeError, {"query": [1.0]}),
    (TypeError, {"value": None}),
    (TypeError, {"is_causal": "yes"}),
    (TypeError, {"attn_mask": "yes"}),
    (TypeError, {"scale": "much"}),
]


@pytest.mark.filterwarnings("ignore::fagen.ops.attention.fallback.FallbackWarning")
@pytest.mark.parametrize(("kind", "changes"), ODD, ids=range(len(ODD)))
def test_sdpa_raises_what_pytorchs_raises(kind: type[Exception], changes: dict) -> None:
    given: dict = dict(zip(("query", "key", "value"), bhsd(), strict=True))
    for name, value in changes.items():
        given[name] = value(given[name]) if callable(value) else value
    for call in (fagen.sdpa, F.scaled_dot_product_attention):
        with pytest.raises(kind):
            call(**given)


@pytest.mark.filterwarnings("ignore::fagen.ops.attention.fallback.FallbackWarning")
@pytest.mark.parametrize("how", ["float32", "float64"])
def test_sdpa_gradients_are_those_of_pytorch(how: str) -> None:
    """By a kernel, and by PyTorch itself: top-left causal of unequal lengths."""
    leaves = [t.to(getattr(torch, how)).requires_grad_() for t in bhsd()]
    got, want = (f(*leaves, is_causal=True) for f in (fagen.sdpa, F.scaled_dot_product_attention))
    same(got, want)
    dout = torch.randn_like(want)
    for mine, theirs in zip(*(torch.autograd.grad(out, leaves, dout) for out in (got, want)), strict=True):
        same(mine, theirs)


@pytest.mark.parametrize("mask", [torch.rand(33, 47) > 0.3, torch.randn(33, 47)])
def test_sdpa_mask_tensors_go_to_pytorch(mask: torch.Tensor) -> None:
    q, k, v = bhsd()
    with pytest.warns(fallback.FallbackWarning, match="mask tensor"):
        got = fagen.sdpa(q, k, v, mask)
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, mask))


def test_sdpa_other_ranks_go_to_pytorch() -> None:
    q = torch.randn(7, 5, 16)
    with pytest.warns(fallback.FallbackWarning, match="4 dimensions"):
        same(fagen.sdpa(q, q, q), F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_dropout(is_causal: bool) -> None:
    q, k, v = bhsd(33, 33)
    torch.manual_seed(1)
    got = fagen.sdpa(q, k, v, dropout_p=0.5, is_causal=is_causal)
    torch.manual_seed(1)
    want = fagen.attention(q, k, v, layout="bhsd", causal=is_causal, dropout_p=0.5)
    assert torch.equal(got, want) and not torch.equal(got, fagen.sdpa(q, k, v, is_causal=is_causal))


# ---- torch's own checks -------------------------------------------------------------------------------------------

PLAIN = (None, None, True, True, -1, -1, 0.0, None, False, 0.0, None)


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
    torch.library.opcheck(op, (q, k, v, intervals, torch.rand(4), True, False, 5, -1, 2.0, 0.3, False, 0.0, None))


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


@pytest.mark.parametrize("columns", [0, 2])
def test_torch_compile_where_every_size_is_a_symbol(columns: int) -> None:
    """Heads and columns of intervals as well, with a gradient and without."""
    torch._dynamo.reset()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: torch.Tensor | None) -> torch.Tensor:
        return fagen.attention(q * 2, k, v, layout="bhsd", causal=True, intervals=intervals)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for wanted in (False, True):
        q, k, v = (t.requires_grad_(wanted) for t in bhsd(40, 40))
        intervals = torch.full((1, 1, 40, columns), 30, dtype=torch.int32) if columns else None
        got = compiled(q, k, v, intervals)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same(got, attend(q, k, v, intervals))
        assert got.requires_grad == wanted


def test_torch_compile_with_gradients() -> None:
    torch._dynamo.reset()
    inputs = [t.requires_grad_() for t in bhsd()]

    def causal(*tensors: torch.Tensor) -> torch.Tensor:
        return fagen.attention(*tensors, layout="bhsd", causal=True)

    compiled = torch.compile(causal, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(compiled(*inputs).square().sum(), inputs)]
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
    assert right(out, q, k, v, layout="bhsd") and torch.equal(doubled, out * 2)


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
