"""Arguments of a call: what is taken for a number, what is refused, which memory `out` may have; by every road."""

from __future__ import annotations

import inspect
import itertools
import math
import random
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fagen
from fagen import api
from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments, fallback
from fagen.ops.attention.call import AttentionCall, OpArguments
from fagen.runtime import binding
from tests.support.calls import Case, example, right


@pytest.fixture(params=["ops", "ctypes", "PyTorch"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options with which a call takes the C++ ops, ctypes, or PyTorch; and that it does."""
    if request.param == "PyTorch":
        warnings.simplefilter("ignore", fallback.FallbackWarning)
        return {"scale": -0.25}
    warnings.simplefilter("error", fallback.FallbackWarning)
    if request.param == "ctypes":
        monkeypatch.setattr(api, "_ops_ready", lambda: False)
        monkeypatch.setattr(api, "_fast", None)
    return {}


def attend(case: Case, **options: Any) -> Any:
    return fagen.attention(case.q, case.k, case.v, **options)


# ---- out ----------------------------------------------------------------------------------------------------------


def packed() -> tuple[torch.Tensor, Case]:
    """(batch, rows, q | k | v | room for out)."""
    buffer = torch.randn(2, 33, 4, 4, 16)
    return buffer, Case(buffer[:, :, 0], buffer[:, :, 1], buffer[:, :, 2], {})


OVERLAPS: list[tuple[str, Callable[[torch.Tensor, Case], torch.Tensor]]] = [
    ("out shares memory with q", lambda buffer, case: case.q),
    ("out shares memory with k", lambda buffer, case: case.k),
    ("out shares memory with v", lambda buffer, case: case.v),
    ("out shares memory with v", lambda buffer, case: buffer.flatten(2).narrow(2, 132, 64).unflatten(2, (4, 16))),
    ("out shares memory with q", lambda buffer, case: buffer.view(-1)[: 2 * 33 * 64].view(2, 33, 4, 16)),
    ("two of its elements share", lambda buffer, case: torch.zeros(2, 33, 1, 16).expand(2, 33, 4, 16)),
    ("two of its elements share", lambda buffer, case: torch.zeros(9999).as_strided((2, 33, 4, 16), (2112, 64, 15, 1))),
]


@pytest.mark.parametrize(("words", "make"), OVERLAPS, ids=range(len(OVERLAPS)))
@pytest.mark.parametrize("warm", [False, True])
def test_out_must_lie_apart(road: dict, words: str, make: Callable, warm: bool) -> None:
    buffer, case = packed()
    if warm:
        attend(case, out=torch.empty(2, 33, 4, 16), **road)
    before = buffer.clone()
    with pytest.raises(InvalidArgument, match=words):
        attend(case, out=make(buffer, case), **road)
    assert torch.equal(buffer, before)


def test_out_over_the_mask_or_the_slopes(road: dict) -> None:
    case = example(h=4, hk=4, sq=2, sk=2)
    memory = torch.zeros(2, 2, 4, 16)
    slopes, intervals = memory.view(-1)[5:9], memory.view(torch.int32).view(-1)[8:12].view(2, 1, 2, 1)
    with pytest.raises(InvalidArgument, match="out shares memory with alibi_slopes"):
        attend(case, out=memory, alibi_slopes=slopes, **road)
    with pytest.raises(InvalidArgument, match="out shares memory with intervals"):
        attend(case, out=memory, intervals=intervals, **road)


def test_out_may_lie_between_its_inputs(road: dict) -> None:
    buffer, case = packed()
    out = buffer[:, :, 3]
    assert attend(case, out=out, **road) is out
    assert right(out, case.q, case.k, case.v, **road)


def test_a_call_of_the_op_itself_is_refused_too() -> None:
    buffer, case = packed()
    assert binding.load() is not None
    with pytest.raises(InvalidArgument, match="out shares memory with v"):
        torch.ops.fagen.forward_out(
            case.q, case.k, case.v, None, None, False, False, -1, -1, 0.0, None, False, 0.0, None, False, case.v
        )


def addresses(t: torch.Tensor) -> list[int]:
    reach = itertools.product(*(range(size) for size in t.shape))
    first = t.storage_offset() * t.element_size()
    places = (first + t.element_size() * sum(map(int.__mul__, at, t.stride())) for at in reach)
    return [place + byte for place in places for byte in range(t.element_size())]


def test_overlap_is_what_a_list_of_all_addresses_says() -> None:
    draw, memory, seen = random.Random(4), torch.zeros(4000), {True: 0, False: 0}
    for _ in range(2000):
        pair = []
        for _ in range(2):
            sizes, strides = (
                [draw.choice((1, 2, 3, 4)) for _ in range(3)],
                [draw.choice((0, 1, 2, 3, 4, 8, 12)) for _ in "abc"],
            )
            flat = memory if draw.random() < 0.7 else memory.view(torch.int16)
            pair.append(flat.as_strided(sizes, strides, draw.randrange(60)))
        want = not set(addresses(pair[0])).isdisjoint(addresses(pair[1]))
        assert arguments.may_overlap(*pair) == want, [(t.shape, t.stride(), t.storage_offset()) for t in pair]
        seen[want] += 1
        itself = addresses(pair[0])
        if len(set(itself)) < len(itself):
            assert arguments.overlaps_itself(pair[0])
    assert min(seen.values()) > 200
    a = torch.zeros(2, 3, 4, 5).permute(2, 0, 3, 1)
    assert not arguments.overlaps_itself(a) and not arguments.overlaps_itself(a[..., :2])
    assert not arguments.may_overlap(memory[:0], memory) and not arguments.overlaps_itself(memory[:0].expand(3, 0))


def test_overlap_of_large_tensors_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_MOST_STEPS", 300)
    buffer = torch.empty(1).expand(1, 1).as_strided((4, 1 << 20, 3, 32, 128), (0, 0, 0, 0, 0))
    fake = SimpleNamespace  # only what is asked of a tensor: nothing of this size is in memory
    strides = (3 * 4096 * (1 << 20), 3 * 4096, 128, 1)
    a, b = (
        fake(shape=(4, 1 << 20, 32, 128), stride=lambda: strides, data_ptr=lambda at=at: at * 8192, numel=buffer.numel,
             element_size=lambda: 2, device=torch.device("cpu"))
        for at in (0, 1)
    )  # fmt: skip
    assert not arguments.may_overlap(a, b) and not arguments.may_overlap(b, a)  # type: ignore[arg-type]
    assert arguments.may_overlap(a, a)  # type: ignore[arg-type]
    monkeypatch.setattr(arguments, "_MOST_STEPS", 1)
    assert arguments.may_overlap(a, b), "not known is refused"  # type: ignore[arg-type]


@pytest.mark.parametrize("return_lse", [False, True])
def test_out_counts_as_changed(road: dict, return_lse: bool) -> None:
    case, out, weight = example(), torch.ones(2, 33, 4, 16), torch.ones((), requires_grad=True)
    attend(case, out=torch.empty_like(out), **road)
    loss = (weight * out).sum()  # which saves `out`
    version, of_q = out._version, case.q._version
    attend(case, out=out, return_lse=return_lse, **road)
    assert out._version > version and case.q._version == of_q
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = out._version
    attend(case, out=out[:], **road)
    assert out._version > version, "a view's version is its base's"


def test_out_in_inference_mode(road: dict) -> None:
    case = example()
    with torch.inference_mode():
        mine, out = torch.empty(2, 33, 4, 16), torch.empty(2, 33, 4, 16)
        for _ in range(2):
            attend(case, out=mine, **road)
    attend(case, out=out.clone(), **road)
    with pytest.raises(RuntimeError, match="[Ii]nference tensor"):
        attend(case, out=out, **road)


def test_gradients_reach_an_out_that_the_op_fills() -> None:
    case = example(h=2, hk=2)
    case.q.requires_grad_()
    assert binding.load() is not None
    out = torch.zeros(2, 33, 2, 16)
    torch.ops.fagen.forward_out(
        case.q, case.k, case.v, None, None, False, False, -1, -1, 0.0, None, False, 0.0, None, False, out
    )
    (got,) = torch.autograd.grad(out.square().sum(), case.q)
    q, k, v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
    (want,) = torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(q, k, v).square().sum(), case.q)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


# ---- numbers ------------------------------------------------------------------------------------------------------


class Index:
    def __index__(self) -> int:
        return 9


def bounds() -> list[Any]:
    numpy = pytest.importorskip("numpy")
    return [Index(), torch.tensor(9), torch.tensor([9], dtype=torch.int16), numpy.int64(9), numpy.uint8(9)]


def test_whatever_is_an_index_is_a_bound(road: dict) -> None:
    case = example()
    want = attend(case, window=(9, 9), **road)
    for bound in bounds():
        assert torch.equal(attend(case, window=(bound, bound), **road), want), bound
        if not road:
            assert torch.equal(fagen.flash_attn_func(case.q, case.k, case.v, window_size=[bound, bound]), want)
    want = fagen.flash_attn_func(case.q, case.k, case.v, window_size=(9, -1))
    got = fagen.flash_attn_func(case.q, case.k, case.v, window_size=(torch.tensor(9), torch.tensor(-3)))
    assert torch.equal(got, want)


def test_whatever_is_a_number_is_a_scale_and_a_softcap(road: dict) -> None:
    numpy = pytest.importorskip("numpy")
    case, sign = example(), -1 if road else 1
    want = attend(case, scale=0.5 * sign, softcap=2.0)
    for kind in (torch.tensor, numpy.float32, numpy.float64, numpy.array, lambda x: torch.tensor([x]).half()):
        assert torch.equal(attend(case, scale=kind(0.5 * sign), softcap=kind(2.0)), want), kind


def test_whatever_is_true_is_causal(road: dict) -> None:
    numpy = pytest.importorskip("numpy")
    case = example()
    want, other = attend(case, causal=True, **road), attend(case, **road)
    for value in (1, numpy.bool_(True), torch.tensor(True)):
        assert torch.equal(attend(case, causal=value, **road), want), value
    for value in (0, numpy.bool_(False), torch.tensor(False)):
        assert torch.equal(attend(case, causal=value, **road), other), value


def test_wide_windows_show_everything(road: dict) -> None:
    """A bound near 2^31 must not be added to a row in 32 bits."""
    for sq, sk in ((33, 47), (47, 33)):
        case = example(sq=sq, sk=sk)
        for window in ((2**31 - 1, 2**31 - 1), (2**31 - 1, 40), (40, 2**31 - 1)):
            out = attend(case, window=window, **road)
            assert right(out, case.q, case.k, case.v, window=window, **road), (sq, sk, window)


def sparse(t: torch.Tensor) -> torch.Tensor:
    return t.to_sparse()


def nested(t: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(t))


def quantized(t: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


REFUSED: list[tuple[str, type[Exception], dict[str, Any]]] = [
    *((f"{name} must be a tensor, not list", TypeError, {name: [1.0]}) for name in "qkv"),
    ("q must be a tensor, not NoneType", TypeError, {"q": None}),
    *((f"{n} must be a dense tensor, not torch.sparse_coo", RuntimeError, {n: sparse}) for n in "qkv"),
    *((f"{n} must be a dense tensor, not nested", RuntimeError, {n: nested}) for n in "qkv"),
    *((f"{n} must be a dense tensor, not quantized", RuntimeError, {n: quantized}) for n in "qkv"),
    ("the same floating-point dtype", RuntimeError, dict.fromkeys("qkv", lambda t: t.to(torch.complex64))),
    ("the same floating-point dtype", RuntimeError, dict.fromkeys("qkv", lambda t: t.to(torch.float8_e5m2))),
    ("intervals must be a tensor, not list", TypeError, {"intervals": [1]}),
    ("alibi_slopes must be a tensor, not float", TypeError, {"alibi_slopes": 0.5}),
    ("out must be a tensor, not str", TypeError, {"out": "here"}),
    ("causal='yes' is neither", TypeError, {"causal": "yes"}),
    ("causal=2 is neither", TypeError, {"causal": 2}),
    ("causal=None is neither", TypeError, {"causal": None}),
    ("return_lse='yes' is neither", TypeError, {"return_lse": "yes"}),
    ("softcap=inf must be positive and finite", ValueError, {"softcap": math.inf}),
    ("softcap=nan must be positive and finite", ValueError, {"softcap": math.nan}),
    ("softcap=1e-40 is too small", ValueError, {"softcap": 1e-40}),
    ("softcap=1e-10 is too small", ValueError, {"softcap": 1e-10, "scale": 1e30}),
    ("softcap='3' is not a number", TypeError, {"softcap": "3"}),
    ("softcap=None is not a number", TypeError, {"softcap": None}),
    ("scale=inf must be finite", ValueError, {"scale": math.inf}),
    ("scale=-inf must be finite", ValueError, {"scale": -math.inf}),
    ("scale=nan must be finite", ValueError, {"scale": math.nan}),
    ("scale=1e+39 must be finite", ValueError, {"scale": 1e39}),
    ("must be finite", ValueError, {"scale": 10**400}),
    ("must be finite", ValueError, {"scale": 10**5000}),
    ("scale=1j is not a number", TypeError, {"scale": 1j}),
    ("is not a number", TypeError, {"scale": torch.ones(2)}),
    ("scale requires a gradient", RuntimeError, {"scale": torch.tensor(0.5, requires_grad=True)}),
    ("bounds are integers", TypeError, {"window": ("3", None)}),
    ("bounds are integers", TypeError, {"window": (torch.ones(2), None)}),
    ("bounds are integers", TypeError, {"window": (torch.tensor(3.0), None)}),
    ("bounds are integers", ValueError, {"window": (2**31, None)}),
    ("window='ab' is not (left, right)", ValueError, {"window": "ab"}),
    ("layout ['bshd'] is unknown", ValueError, {"layout": ["bshd"]}),
]


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(("words", "kind", "changes"), REFUSED, ids=range(len(REFUSED)))
def test_refused_in_words_of_our_own(road: dict, words: str, kind: type[Exception], changes: dict) -> None:
    case = example()
    attend(case)  # what the table knows does not let others pass
    given: dict[str, Any] = {"q": case.q, "k": case.k, "v": case.v, **road}
    for name, value in changes.items():
        given[name] = value(given[name]) if callable(value) else value
    for call in (fagen.attention, AttentionCall.of):
        with pytest.raises(InvalidArgument) as caught:
            call(**given)
        assert words in str(caught.value) and isinstance(caught.value, kind), caught.value
        assert isinstance(caught.value, ValueError) and isinstance(caught.value, RuntimeError)
        assert len(str(caught.value).splitlines()) <= 3 and max(map(len, str(caught.value).splitlines())) < 200


@pytest.mark.parametrize("value", [-1, math.nan, 2, math.inf, "much"])
@pytest.mark.parametrize("call", [fagen.flash_attn_func, fagen.sdpa])
def test_dropout_is_a_probability(call: Callable, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="dropout_p"):
        call(*[torch.zeros(1, 2, 2, 16)] * 3, dropout_p=value)


def test_lazily_negated_tensors_count_as_what_they_are(road: dict) -> None:
    """Their memory holds the opposite: it must not be read as it is."""
    case = example()
    negated = torch._neg_view(case.k)
    assert negated.is_neg()
    want = attend(Case(case.q, -case.k, case.v, {}), **road)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(fagen.attention(case.q, negated, case.v, **road), want, atol=1e-5, rtol=1e-5)


# ---- sizes that 32 bits do not hold -------------------------------------------------------------------------------

HUGE = 2**31


def repeated(shape: tuple[int, ...]) -> torch.Tensor:
    """Of any size, in little memory."""
    return torch.zeros(shape[-1]).expand(shape)


LARGE = {
    "q rows": ((1, HUGE, 1, 16), (1, 3, 1, 16)),
    "keys": ((1, 3, 1, 16), (1, HUGE, 1, 16)),
    "batch": ((HUGE, 1, 1, 16), (HUGE, 1, 1, 16)),
    "heads": ((1, 1, HUGE, 16), (1, 1, 1, 16)),
    "all heads": ((1, 1, HUGE, 16), (1, 1, HUGE, 16)),
}


@pytest.mark.parametrize("name", LARGE)
def test_sizes_beyond_32_bits_are_refused(road: dict, name: str) -> None:
    q, k = (repeated(shape) for shape in LARGE[name])
    with pytest.raises(InvalidArgument, match="size (is )?beyond 2"):
        fagen.attention(q, k, k, **road)
    assert binding.load() is not None
    for op in (torch.ops.fagen.forward, torch.ops.fagen.forward_lse):
        with pytest.raises(InvalidArgument, match="a size is beyond 2.31 - 1"):
            op(q, k, k, None, None, False, False, -1, -1, 0.0, None, False, 0.0, None)


@pytest.mark.parametrize(("softcap", "scale"), [(math.inf, None), (0.0, math.inf), (0.0, math.nan), (0.0, 1e300)])
def test_the_op_itself_refuses_numbers_that_are_not_finite(softcap: float, scale: float | None) -> None:
    case = example()
    attend(case), attend(case, softcap=1.0)
    with pytest.raises(InvalidArgument, match="must be finite"):
        torch.ops.fagen.forward(
            case.q, case.k, case.v, None, None, False, False, -1, -1, softcap, scale, False, 0.0, None
        )


def test_the_op_itself_leaves_a_scale_that_is_not_positive_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = example()
    attend(case)
    asked: list[object] = []
    monkeypatch.setattr(fallback, "attend", lambda *a, real=fallback.attend, **o: asked.append(o) or real(*a, **o))
    out = torch.ops.fagen.forward(
        case.q, case.k, case.v, None, None, False, False, -1, -1, 0.0, -0.25, False, 0.0, None
    )
    assert asked and right(out, case.q, case.k, case.v, scale=-0.25)


def test_lengths_that_kernels_take_for_no_bound_are_left_to_pytorch() -> None:
    q, k = repeated((1, 1, 1, 16)), repeated((1, 2**29 + 1, 1, 16))
    assert "larger than 536870912" in AttentionCall.of(q, k, k).refusal
    assert AttentionCall.of(q, k[:, :-1], k[:, :-1]).refusal == ""
    assert "larger than 536870912" in AttentionCall.of(k, q, q).refusal


# ---- a call in the form that all else takes -------------------------------------------------------------------------


def test_a_call_holds_what_the_ops_take() -> None:
    case = example(causal=1, window=(torch.tensor(4), None), softcap=2, scale=True, return_lse=1)
    call = case.call()
    assert (call.window, call.softcap, call.scale, call.want_lse) == ((4, 0), 2.0, 1.0, True)
    given = call.op_arguments()[5:]
    assert [type(value) for value in given] == [
        bool,
        bool,
        int,
        int,
        float,
        float,
        bool,
        float,
        type(None),
    ] and call.want_lse is True


@pytest.mark.parametrize("columns", [0, 1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (3, 0), (3, 5)])
def test_the_ops_arguments_are_the_call_again(columns: int, causal: bool, window: tuple) -> None:
    """Causal is folded into the window, and still tells what two columns of intervals mean."""
    intervals = torch.zeros(1, 1, 47, columns, dtype=torch.int32) if columns else None
    call = example(causal=causal, window=window, intervals=intervals, alibi_slopes=torch.rand(4)).call()
    for again in (
        AttentionCall.of_op(call.op_arguments(), want_lse=False),
        AttentionCall.trusting(call.op_arguments(), want_lse=False),
    ):
        for name in AttentionCall.__dataclass_fields__:
            mine, other = getattr(call, name), getattr(again, name)
            assert mine is other if isinstance(mine, torch.Tensor) else mine == other, name


def test_python_and_cpp_name_the_same_arguments() -> None:
    """The ops' schema in C++, the list of it in Python, and the order in which the fast road is handed a call."""
    module, own = binding.load(), {"forward_out": ["want_lse", "out"], "resolve": ["out", "want_lse"]}
    own |= {
        "fallback": ["want_lse"],
        "refuse_overlap": ["out"],
        "forward": [],
        "forward_lse": [],
        "resolve_backward": [],
    }
    own |= {name: ["out", "lse", "dout", "dlse"] for name in ("backward", "fallback_backward")}
    for name, more in own.items():
        schema = getattr(torch.ops.fagen, name).default._schema
        assert [argument.name for argument in schema.arguments] == [*OpArguments._fields, *more], name
    by_python = ("sinks", "descale_q", "descale_k", "descale_v", "descale_block")
    public = ", ".join(name for name in inspect.signature(fagen.attention).parameters if name not in by_python)
    assert module.attention.__doc__ == f"attention({public})" and module.sdpa.__doc__ == f"sdpa({public})"
