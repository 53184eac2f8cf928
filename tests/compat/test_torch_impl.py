"""`fagen.register_torch`: our kernel of PyTorch's flash attention op, here registered for tensors of the CPU.

PyTorch's own kernel and its backward exist for CUDA alone. Stand-ins for the CPU take their places, written from what
the ops are defined to return and to read.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fagen
from fagen import api
from fagen.compat import torch_impl
from fagen.dispatch import attention as dispatch
from fagen.dispatch import plan, resolve
from fagen.errors import MissingTool
from fagen.ops.attention import fallback
from tests.support.calls import right

registry = nn.attention
pytestmark = pytest.mark.skipif(
    not hasattr(registry, "register_flash_attention_impl"), reason="torch older than 2.11 has no registry"
)
OP = "_scaled_dot_product_flash_attention"
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which stand-in was called. Our kernel is not active yet."""
    calls: list[str] = []

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> tuple:  # fmt: skip
        calls.append("forward")
        empty = torch.empty(0, dtype=torch.uint64)
        return torch.zeros_like(q), q.new_zeros(q.shape[:3]).float(), None, None, 0, 0, empty, empty, q.new_empty(0)

    def backward(
        grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
        cum_q: object, cum_k: object, max_q: int, max_k: int, dropout_p: float, is_causal: bool, *_: torch.Tensor,
        scale: float | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """From the output and the LSE, as FlashAttention's backward goes."""
        calls.append("backward")
        assert (max_q, max_k, cum_q, cum_k, dropout_p) == (q.shape[2], k.shape[2], None, None, 0.0)
        assert lse.dtype == torch.float32 and lse.is_contiguous()
        scale = scale if scale is not None else q.shape[3] ** -0.5
        weights = torch.exp(q @ k.transpose(-1, -2) * scale - lse[..., None])
        weights = weights.tril() if is_causal else weights
        scores = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
        return scores @ k, scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad

    def packed_forward(q: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        calls.append("packed forward")
        empty = torch.empty(0, dtype=torch.uint64)
        return torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0]).float(), empty, empty, q.new_empty(0)

    def packed_backward(grad: torch.Tensor, *tensors: torch.Tensor, **_: object) -> tuple[torch.Tensor, ...]:
        calls.append("packed backward")
        return tuple(torch.zeros_like(t) for t in tensors[:3])

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fallback.FallbackWarning)
        library.impl(OP, forward, "CPU")
        library.impl(f"{OP}_backward", backward, "CPU")
        library.impl("_flash_attention_forward", packed_forward, "CPU")
        library.impl("_flash_attention_backward", packed_backward, "CPU")
        monkeypatch.setattr(torch_impl, "_dispatch_key", "CPU")
        yield calls
        registry.restore_flash_attention_impl(_raise_warn=False)
        registry._registry._FLASH_ATTENTION_IMPLS.pop("fagen", None)
        library._destroy()


def inputs(rows: int = 33, keys: int = 33, heads: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    shapes = ((2, 4, rows, 16), (2, heads, keys, 16), (2, heads, keys, 16))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def flash(*given: torch.Tensor, **options: object) -> tuple:
    return getattr(aten, OP)(*given, **options)


def test_it_comes_and_goes(asked: list[str]) -> None:
    q, k, v = inputs()
    fagen.register_torch(activate=False)
    assert "fagen" in registry.list_flash_attention_impls()
    flash(q, k, v)
    assert asked == ["forward"] and registry.current_flash_attention_impl() is None
    registry.activate_flash_attention_impl("fagen")
    assert right(flash(q, k, v)[:2], q, k, v, layout="bhsd")
    assert asked == ["forward"] and registry.current_flash_attention_impl() == "fagen"
    registry.restore_flash_attention_impl()
    flash(q, k, v)
    assert asked == ["forward"] * 2 and registry.current_flash_attention_impl() is None
    for _ in range(2):  # again, and while it is active
        fagen.register_torch()
        assert right(flash(q, k, v)[:2], q, k, v, layout="bhsd") and asked == ["forward"] * 2
    registry.restore_flash_attention_impl()
    assert (flash(q, k, v)[0] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_what_the_op_returns(causal: bool, heads: int, order: tuple[int, ...], asked: list[str]) -> None:
    """Sizes, strides and dtypes are those that a tracer is told."""
    fagen.register_torch()
    q, k, v = inputs(heads=heads)
    q = q.permute(*order, 3).contiguous().permute(*(order.index(i) for i in range(3)), 3)
    got = flash(q, k, v, is_causal=causal, scale=0.3)
    assert asked == [] and right(got[:2], q, k, v, layout="bhsd", causal=causal, scale=0.3)
    told = flash(*(t.to("meta") for t in (q, k, v)), is_causal=causal, scale=0.3)
    for mine, theirs in zip(got, told, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        else:
            assert mine == theirs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("whose", ["ours", "of the kernel before"])
def test_gradients(whose: str, causal: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Either backward is given our output and our LSE."""
    fagen.register_torch()
    assert api._ops_registered()
    leaves = [t.requires_grad_() for t in inputs(heads=4 if whose != "ours" else 2)]
    with monkeypatch.context() as patch:
        patch.setattr(fallback, "attend", lambda *_: pytest.fail("no kernel computed"))
        out = flash(*leaves, is_causal=causal)[0]
    if whose != "ours":
        monkeypatch.setattr(api, "_ops_ready", lambda: False)
        monkeypatch.setenv("FAGEN_BUILD", "background")
    weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    want_out = nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal, enable_gqa=True)
    want = torch.autograd.grad((want_out * weight).sum(), leaves)
    assert asked == ([] if whose == "ours" else ["backward"]) and not out.is_leaf
    torch.testing.assert_close(out, want_out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changes: object) -> tuple[torch.Tensor, ...]:
    """The op's backward, of an output and an LSE that PyTorch computed."""
    how: dict = {"dropout_p": 0.0, "is_causal": False, **changes}
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if how["is_causal"] else None
    scores = (q @ k.transpose(-1, -2)) / q.shape[3] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    lse, nothing = scores.logsumexp(-1), torch.empty(0, dtype=torch.uint64)
    out = scores.softmax(-1) @ v
    sizes = (q.shape[2], k.shape[2])
    return getattr(aten, f"{OP}_backward")(
        torch.ones_like(out),
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        *sizes,
        how["dropout_p"],
        how["is_causal"],
        nothing,
        nothing,
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
def test_the_backward_of_an_output_that_is_not_ours(order: tuple[int, ...], asked: list[str]) -> None:
    """Its sizes and strides are those that a tracer is told."""
    assert api._ops_registered()
    given = [t.permute(*order, 3).contiguous().permute(*(order.index(i) for i in range(3)), 3) for t in inputs()]
    want = gradient(*given, is_causal=True)
    fagen.register_torch()
    got = gradient(*given, is_causal=True)
    assert asked == ["backward"]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert [t.stride() for t in got] == [torch.empty_like(t).stride() for t in given]


@pytest.mark.parametrize("what", ["dropout", "causal of unequal lengths", "no kernel", "capture"])
def test_gradients_that_go_to_the_kernel_before(what: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert api._ops_registered()
    fagen.register_torch()
    resolve.renew()
    if what == "no kernel":
        monkeypatch.setattr(dispatch, "answer_to_gradients", lambda *_: plan.TORCH)
    if what == "capture":
        monkeypatch.setattr(torch_impl, "_capturing", lambda *_: True)
    if what == "dropout":
        with pytest.raises(AssertionError):  # the stand-in knows none
            gradient(*inputs(), dropout_p=0.1)
    elif what == "causal of unequal lengths":
        gradient(*inputs(33, 47), is_causal=True)
    else:
        gradient(*inputs())
    assert asked == ["backward"]


def test_gradients_repeat_where_pytorch_was_told_so(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert api._ops_registered()
    fagen.register_torch()
    resolve.renew()
    problems = []
    decide = dispatch.answer_to_gradients
    monkeypatch.setattr(
        dispatch, "answer_to_gradients", lambda call: problems.append(call.deterministic) or decide(call)
    )
    gradient(*inputs())
    torch.use_deterministic_algorithms(True)
    try:
        gradient(*inputs())
        monkeypatch.setattr(api, "_ops_ready", lambda: False)  # then it waits for them
        gradient(*inputs())
    finally:
        torch.use_deterministic_algorithms(False)
    assert list(dict.fromkeys(problems)) == [False, True] and asked == []


def test_the_backward_kernel_is_asked_for_with_the_forward_one(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nothing is compiled when the gradient is due."""
    fagen.register_torch()
    resolve.renew()
    looks = []
    decide = dispatch.answer_to_gradients
    monkeypatch.setattr(dispatch, "answer_to_gradients", lambda call: looks.append(1) or decide(call))
    flash(*inputs())
    assert not looks
    flash(*(t.requires_grad_() for t in inputs()))
    assert looks and asked == []
    with torch.no_grad():
        looks.clear()
        flash(*(t.requires_grad_() for t in inputs(35, 35)))
    assert not looks


OTHERS: dict[str, tuple[list[torch.Tensor], dict]] = {
    "dropout": (inputs(), {"dropout_p": 0.1}),
    "debug mask": (inputs(), {"return_debug_mask": True}),
    "causal of unequal lengths": (inputs(33, 47), {"is_causal": True}),
    "no kernel of the dtype": ([t.double() for t in inputs()], {}),
    "negative scale": (inputs(), {"scale": -1.0}),
    "rows that are not contiguous": ([t.transpose(2, 3).contiguous().transpose(2, 3) for t in inputs()], {}),
    "nothing": (inputs(0), {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_served_goes_to_the_kernel_before(name: str, asked: list[str]) -> None:
    fagen.register_torch()
    given, options = OTHERS[name]
    flash(*given, **options)
    flash(*given, **options)
    assert asked == ["forward"] * 2


def test_unequal_lengths_without_causality_are_served(asked: list[str]) -> None:
    fagen.register_torch()
    q, k, v = inputs(33, 47)
    assert right(flash(q, k, v)[:2], q, k, v, layout="bhsd") and asked == []


def test_answers_are_kept_until_others_may_hold(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    fagen.register_torch()
    looks = []
    answer_to = dispatch.answer_to
    monkeypatch.setattr(dispatch, "answer_to", lambda *a, **k: looks.append(1) or answer_to(*a, **k))
    monkeypatch.setattr(torch_impl, "_MOST_ANSWERS", 3)
    resolve.renew()
    for _ in range(3):
        flash(*inputs())
    assert len(looks) == 1
    resolve.renew()
    flash(*inputs())
    assert len(looks) == 2 and len(torch_impl._answers) == 1
    for rows in range(1, 9):
        flash(*inputs(rows, rows))
    assert len(torch_impl._answers) <= 3 and asked == []


def test_where_pytorch_is_the_faster_one_it_serves(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    fagen.register_torch()
    resolve.renew()
    monkeypatch.setattr(dispatch, "answer_to", lambda *_, ours: plan.ASK if ours else plan.TORCH)
    flash(*inputs())
    assert asked == ["forward"]


# ---- packed sequences ------------------------------------------------------------------------------------------------

OF_Q, OF_K = (0, 13, 13, 40, 57), (0, 20, 31, 60, 64)


def packed(of_q: tuple[int, ...], of_k: tuple[int, ...], kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    shapes = ((of_q[-1], 4, 16), (of_k[-1], kv_heads, 16), (of_k[-1], kv_heads, 16))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, of_q: tuple[int, ...], of_k: tuple[int, ...], **how: Any
) -> torch.Tensor:
    """Each sequence alone, in PyTorch's own operations. Rows that see nothing are zero."""
    left, right = how.get("window_size", (-1, -1))
    outs = []
    for (a, b), (c, d) in zip(itertools.pairwise(of_q), itertools.pairwise(of_k), strict=True):
        mine, keys, values = q[a:b].transpose(0, 1), *(t[c:d].transpose(0, 1).repeat_interleave(2, 0) for t in (k, v))
        place = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
        hidden = (place > left if left >= 0 else place < -(1 << 30)) | (
            -place > right if right >= 0 else place > 1 << 30
        )
        scores = (mine @ keys.transpose(1, 2) * how.get("scale", 0.25)).masked_fill(hidden, -torch.inf)
        weights = torch.where(hidden.all(1, keepdim=True), 0.0, scores.softmax(-1))
        outs.append((weights @ values).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("how", [{}, {"window_size": (-1, 0)}, {"window_size": (9, 0), "scale": 0.3}], ids=str)
@pytest.mark.parametrize("same", [True, False])
def test_packed_sequences(how: dict[str, Any], same: bool, asked: list[str]) -> None:
    """`varlen_attn` and its gradients."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert api._ops_registered()
    fagen.register_torch()
    of_q, of_k = (OF_K, OF_K) if same else (OF_Q, OF_K)
    cu_q = torch.tensor(of_q, dtype=torch.int32)
    cu_k = cu_q if same else torch.tensor(of_k, dtype=torch.int32)
    leaves = [t.requires_grad_() for t in packed(of_q, of_k)]
    out = varlen.varlen_attn(*leaves, cu_q, cu_k, 33, 33, enable_gqa=True, **how)
    weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    want_out = one_by_one(*leaves, of_q, of_k, **how)
    want = torch.autograd.grad((want_out * weight).sum(), leaves)
    assert asked == []
    torch.testing.assert_close(out, want_out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def packed_flash(*given: torch.Tensor, **options: Any) -> tuple:
    cu = torch.tensor(OF_K, dtype=torch.int32)
    dropout, sequences = options.pop("dropout_p", 0.0), options.pop("sequences", (cu, cu))
    return aten._flash_attention_forward(*given, *sequences, 33, 33, dropout, False, False, **options)


PACKED_OTHERS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout_p": 0.1},
    "used lengths": {"seqused_k": torch.ones(4, dtype=torch.int32)},
    "slopes": {"alibi_slopes": torch.ones(4)},
    "no sequences": {"sequences": (None, None)},
    "negative scale": {"scale": -1.0},
}


@pytest.mark.parametrize("name", PACKED_OTHERS)
def test_packed_calls_that_go_to_the_kernel_before(name: str, asked: list[str]) -> None:
    fagen.register_torch()
    packed_flash(*packed(OF_K, OF_K), **PACKED_OTHERS[name])
    assert asked == ["packed forward"]


def test_packed_gradients_of_dropout_go_to_the_kernel_before(asked: list[str]) -> None:
    assert api._ops_registered()
    fagen.register_torch()
    q, k, v = packed(OF_K, OF_K)
    out, lse, state, nothing, _ = packed_flash(q, k, v)
    cu = torch.tensor(OF_K, dtype=torch.int32)
    for dropout in (0.0, 0.1):
        aten._flash_attention_backward(out, q, k, v, out, lse, cu, cu, 33, 33, dropout, False, state, nothing)
    assert asked == ["packed backward"]


def test_what_the_packed_op_returns(asked: list[str]) -> None:
    fagen.register_torch()
    given = packed(OF_K, OF_K)
    got, told = packed_flash(*given), packed_flash(*given, dropout_p=0.1)
    assert asked == ["packed forward"]
    assert [t.shape for t in got[:2]] == [t.shape for t in told[:2]] and got[1].dtype == torch.float32
    assert [t.stride() for t in got[:2]] == [t.stride() for t in told[:2]]


def test_a_build_of_torch_without_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "_dispatch_key", "XPU")
    with pytest.raises(MissingTool, match="no flash attention for XPU"):
        fagen.register_torch()
    assert registry.current_flash_attention_impl() is None


def test_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(registry, "register_flash_attention_impl")
    with pytest.raises(MissingTool, match=r"2\.11 or newer"):
        fagen.register_torch()
