"""Attention sinks against their definition: one more key, whose score is the sink and which has no value."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import pytest
import torch

import fagen
from fagen import api
from fagen.dispatch.attention import kernel_of
from fagen.errors import InvalidArgument
from fagen.ops.attention import fallback, masks, reference, sinks
from tests.support.calls import Case, example, run

DOCUMENTS = masks.from_documents(torch.arange(40).expand(2, 40) // 11)
CASES: dict[str, dict] = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (5, 3), "softcap": 2.0},
    "alibi": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 1.0]), "scale": 0.3},
    "documents": {"causal": True, "intervals": DOCUMENTS, "sk": 40, "sq": 40},
    "one row": {"causal": True, "sq": 1},
    "rows that see nothing": {"causal": True, "sq": 40, "sk": 9},
}


@pytest.fixture(autouse=True, params=["ops", "ctypes"])
def _roads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.simplefilter("ignore", fallback.FallbackWarning)
    if request.param == "ctypes":
        monkeypatch.setattr(api, "_ops_ready", lambda: False)
        monkeypatch.setattr(api, "_fast", None)


def with_sinks(**options: object) -> Case:
    """Sinks near the scores, far above and far below them."""
    return example(sinks=torch.tensor([0.3, 40.0, -40.0, 2.0]), **options)  # type: ignore[arg-type]


def definition(case: Case, *, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    call = case.call()
    out, lse = reference.attend(call, reference.cast(call.bhsd(), dtype), reference.visible(call))
    return out if call.layout == "bhsd" else out.transpose(1, 2), lse


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_values(options: dict) -> None:
    case = with_sinks(**options)
    verdict = run(case)
    assert verdict, verdict.message


def test_the_reference_is_the_definition() -> None:
    """Written once more: a key of zeros but for one place, where q is 1 and it has the sink."""
    case = example(hk=4, sinks=torch.tensor([0.3, 4.0, -4.0, 2.0]))
    call = case.call()
    q, k, v = reference.cast(call.bhsd(), torch.float64)
    key = torch.zeros(2, 4, 1, 17, dtype=torch.float64)
    key[..., 0, 16] = call.sinks.double() * 4  # the scale is 1/4
    q = torch.cat([q, torch.ones_like(q[..., :1])], -1)
    k = torch.cat([torch.cat([k, torch.zeros_like(k[..., :1])], -1), key], 2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, torch.nn.functional.pad(v, (0, 0, 0, 1)), scale=0.25)
    torch.testing.assert_close(definition(case)[0], want.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("of_sinks", [torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype, of_sinks: torch.dtype) -> None:
    case = with_sinks(causal=True, layout="bhsd")
    case.q, case.k, case.v = (t.transpose(1, 2).to(dtype) for t in (case.q, case.k, case.v))
    case.options["sinks"] = case.options["sinks"].to(of_sinks)
    out, lse = fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert case.check(out, lse)


def test_out_is_filled() -> None:
    case = with_sinks(causal=True)
    out = torch.full((2, 33, 4, 16), math.nan)
    got, lse = fagen.attention(case.q, case.k, case.v, out=out, return_lse=True, **case.options)
    assert got is out and case.check(out, lse)
    assert fagen.attention(case.q, case.k, case.v, out=out, **case.options) is out and case.check(out, None)


def test_a_call_without_them_is_as_it_was() -> None:
    """The kernel's own output is scaled in place; nothing of it stays behind."""
    case = with_sinks(causal=True)
    plain = {name: value for name, value in case.options.items() if name != "sinks"}
    before = fagen.attention(case.q, case.k, case.v, **plain)
    fagen.attention(case.q, case.k, case.v, **case.options)
    assert torch.equal(before, fagen.attention(case.q, case.k, case.v, **plain))


def test_rows_and_heads_without_anything() -> None:
    case = example(sq=5, sk=2, causal=True, sinks=torch.tensor([0.5, -math.inf, math.inf, 0.0]))
    out, lse = fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options)
    assert (out[:, :3] == 0).all() and torch.equal(lse[:, :, 0], case.options["sinks"].expand(2, 4))
    bare, bare_lse = fagen.attention(case.q, case.k, case.v, return_lse=True, causal=True)
    assert torch.equal(out[:, :, 1], bare[:, :, 1]) and torch.equal(lse[:, 1], bare_lse[:, 1])  # -inf: no sink
    assert (out[:, :, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_keys_and_no_rows(dtype: torch.dtype) -> None:
    q, sink = torch.randn(1, 3, 2, 16, dtype=dtype), torch.tensor([1.0, 2.0])
    out, lse = fagen.attention(q, q[:, :0], q[:, :0], sinks=sink, return_lse=True)
    assert (out == 0).all() and torch.equal(lse, sink[None, :, None].expand(1, 2, 3))
    out, lse = fagen.attention(q[:, :0], q, q, sinks=sink, return_lse=True)
    assert out.shape == (1, 0, 2, 16) and lse.shape == (1, 2, 0)


# ---- derivatives --------------------------------------------------------------------------------------------------


def gradients(
    result: tuple[torch.Tensor, torch.Tensor], leaves: list[torch.Tensor], rows: slice = slice(None)
) -> tuple[torch.Tensor, ...]:
    out, lse = result
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return torch.autograd.grad((out * weight).sum() + lse[:, :, rows].sin().sum().to(out.dtype), leaves)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("into", [False, True])
def test_gradients_are_those_of_the_definition(name: str, into: bool) -> None:
    case = example(sinks=torch.tensor([0.3, 4.0, -4.0, 2.0]), **CASES[name])
    leaves = [t.requires_grad_() for t in (case.q, case.k, case.v, case.options["sinks"])]
    out = {"out": torch.empty(case.q.shape)} if into else {}
    got = gradients(fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options, **out), leaves)
    want = gradients(definition(case), leaves)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert all(one.abs().max() > 0 for one in got)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_gradcheck(layout: str) -> None:
    case = example(b=1, sq=3, sk=2, d=4, causal=True, layout=layout, sinks=torch.tensor([0.3, 1.0, -1.0, 2.0]))
    if layout == "bhsd":
        case.q, case.k, case.v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
    inputs = [t.double().requires_grad_() for t in (case.q, case.k, case.v, case.options["sinks"])]

    def composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, some: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As a kernel's output and LSE go through `apply`, here in float64. The first row sees nothing."""
        call = dataclasses.replace(Case(q, k, v, {**case.options, "sinks": some}).call(), sinks=None)
        out, lse = reference.attend(call, call.bhsd(), reference.visible(call))
        out, lse = sinks.apply(out if layout == "bhsd" else out.transpose(1, 2), lse, some, layout)
        return out, lse.clamp(min=-9)

    def defined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, some: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return definition(Case(q, k, v, {**case.options, "sinks": some}))

    assert torch.autograd.gradcheck(composed, inputs)
    for got, want in zip(composed(*inputs), defined(*inputs), strict=True):
        torch.testing.assert_close(got, want)
    options = {**case.options}
    options.pop("sinks")
    assert torch.autograd.gradcheck(lambda *t: fagen.attention(*t[:3], sinks=t[3], **options), inputs)


def test_only_the_sinks_learn() -> None:
    case = with_sinks(causal=True)
    case.options["sinks"].requires_grad_()
    got = torch.autograd.grad(fagen.attention(case.q, case.k, case.v, **case.options).sum(), case.options["sinks"])
    want = torch.autograd.grad(definition(case)[0].sum(), case.options["sinks"])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_transforms() -> None:
    """vmap over the sinks, and jvp."""
    case = example(causal=True)

    def of(sink: torch.Tensor) -> torch.Tensor:
        return fagen.attention(case.q, case.k, case.v, causal=True, sinks=sink)

    several = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.vmap(of)(several), torch.stack([of(one) for one in several]))
    value, slope = torch.func.jvp(of, (several[0],), (torch.ones(4),))
    step = (of(several[0] + 1e-2) - of(several[0] - 1e-2)) / 2e-2
    torch.testing.assert_close(value, of(several[0]))
    torch.testing.assert_close(slope, step, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("wanted", [False, True])
def test_compiled_without_a_break(wanted: bool) -> None:
    torch._dynamo.reset()
    case = with_sinks(causal=True)
    tensors = [t.requires_grad_(wanted) for t in (case.q, case.k, case.v, case.options["sinks"])]

    def attend(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        room = torch.empty(t[0].shape)
        into = fagen.attention(*t[:3], causal=True, sinks=t[3], out=room)
        return *fagen.attention(*t[:3], causal=True, sinks=t[3], return_lse=True), into

    got, want = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors), attend(*tensors)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
    if wanted:
        grads = [torch.autograd.grad(result[0].square().sum(), tensors) for result in (got, want)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


# ---- at the door --------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, Callable[[torch.Tensor], object]]] = [
    ("sinks must be a tensor, not list", lambda s: s.tolist()),
    ("sinks must be a dense tensor", lambda s: s.to_sparse()),
    ("sinks must have a floating-point dtype", lambda s: s.int()),
    ("sinks are on meta", lambda s: s.to("meta")),
    ("sinks must have shape (heads)", lambda s: s[:2]),
    ("sinks must have shape (heads)", lambda s: s[None]),
]


@pytest.mark.parametrize(("words", "spoil"), REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refusals(words: str, spoil: Callable[[torch.Tensor], object], dtype: torch.dtype) -> None:
    case = with_sinks()
    case.q, case.k, case.v = (t.to(dtype) for t in (case.q, case.k, case.v))
    case.options["sinks"] = spoil(case.options["sinks"])
    with pytest.raises(InvalidArgument) as caught:
        fagen.attention(case.q, case.k, case.v, **case.options)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    with pytest.raises(InvalidArgument):
        case.call()


@pytest.mark.parametrize("spoil", [{"layout": "x"}, {"layout": []}, {"return_lse": "yes"}, {"scale": "much"}])
def test_other_arguments_are_checked_as_without_them(spoil: dict) -> None:
    case = with_sinks(**spoil)
    with pytest.raises(InvalidArgument):
        fagen.attention(case.q, case.k, case.v, **case.options)
    with pytest.raises(InvalidArgument):
        fagen.attention(3, case.k, case.v, **with_sinks().options)  # type: ignore[call-overload]


def test_out_lies_apart_from_the_sinks() -> None:
    case = with_sinks()
    room = torch.zeros(33 * 2 * 4 * 16)
    case.options["sinks"] = room[:4]
    with pytest.raises(InvalidArgument, match="out shares memory with sinks"):
        fagen.attention(case.q, case.k, case.v, out=room.view(2, 33, 4, 16), **case.options)
    assert (room == 0).all()


def test_a_kernel_refuses_them() -> None:
    call = with_sinks().call()
    found = kernel_of(call.without_sinks())
    assert found is not None and kernel_of(call) is None
    with pytest.raises(InvalidArgument, match="no kernel takes sinks"):
        found.launch(call, call.new_outputs())


def test_explain_tells_of_the_kernel() -> None:
    case = with_sinks()
    with_, without = fagen.explain(case.q, case.k, case.v, **case.options), fagen.explain(case.q, case.k, case.v)
    assert with_.problem == without.problem and with_.choice.kind == "family" == without.choice.kind
