"""`fagen.register_torch` on a GPU: scaled_dot_product_attention by our kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention as registry
from torch.nn.attention import SDPBackend, sdpa_kernel

import fagen
from fagen import api
from fagen.compat import torch_impl
from fagen.ops.attention.gradients import FACTOR
from tests.support.calls import right

pytestmark = pytest.mark.skipif(
    not hasattr(registry, "register_flash_attention_impl"), reason="torch older than 2.11 has no registry"
)


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether our kernel served, call by call and gradient by gradient, where PyTorch chose its flash backend."""
    served: list[bool] = []
    serves = torch_impl._serves

    def told(*args: Any, **options: Any) -> bool:
        served.append(serves(*args, **options))
        return served[-1]

    monkeypatch.setattr(torch_impl, "_serves", told)
    assert api._ops_registered()
    fagen.register_torch()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield served
    registry.restore_flash_attention_impl(_raise_warn=False)


def inputs(rows: int = 300, keys: int = 300, heads: int = 4, d: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = ((2, 4, rows, d), (2, heads, keys, d), (2, heads, keys, d))
    return [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("d", [64, 128])
def test_forward(causal: bool, heads: int, d: int, ours: list[bool]) -> None:
    q, k, v = inputs(heads=heads, d=d)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != 4)
    verdict = right(out, q, k, v, layout="bhsd", causal=causal)
    assert verdict and ours == [True], verdict.message


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("whose", ["ours", "PyTorch's forward", "PyTorch's backward"])
def test_gradients(
    whose: str, causal: bool, transposed: bool, ours: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either backward takes the output and the LSE of either forward: as near to float32 as from its own."""
    serves = torch_impl._serves

    def one_of_both(*args: Any, gradients: bool = False, **options: Any) -> bool:
        told = serves(*args, gradients=gradients, **options)
        return told and whose != ("PyTorch's backward" if gradients else "PyTorch's forward")

    monkeypatch.setattr(torch_impl, "_serves", one_of_both)
    tensors = inputs()
    if transposed:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    weight = torch.linspace(-1, 1, tensors[0].numel(), device="cuda").reshape(tensors[0].shape)

    def grads(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = F.scaled_dot_product_attention(*leaves, is_causal=causal)
        return torch.autograd.grad((out.float() * weight).sum(), leaves)

    mine = grads(torch.bfloat16)
    assert ours == [True, True]
    registry.restore_flash_attention_impl()
    theirs = grads(torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        exact = grads(torch.float32)
    assert len(ours) == 2
    for got, peer, want in zip(mine, theirs, exact, strict=True):
        error, allowed = (got - want).abs().max(), (peer - want).abs().max()
        assert error <= FACTOR * allowed + 1e-3, (error, allowed)


def test_compiled(ours: list[bool]) -> None:
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in inputs()]
    attend = torch.compile(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), fullgraph=True)
    out = attend(*leaves)
    assert right(out.detach(), *(t.detach() for t in leaves), layout="bhsd", causal=True) and ours == [True]
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, dout)
    assert ours == [True, True]
    want = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, dout)
    for a, b in zip(got, want, strict=True):  # dQ is added up in any order
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_gradients_repeat_where_pytorch_was_told_so(ours: list[bool]) -> None:
    leaves = [t.requires_grad_() for t in inputs(heads=2)]
    dout = torch.randn_like(leaves[0])

    def once() -> tuple[torch.Tensor, ...]:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, leaves, dout)

    torch.use_deterministic_algorithms(True)
    try:
        first = once()
        for _ in range(100):
            assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(ours) and len(ours) == 2 * 101


def test_a_step_in_a_graph(ours: list[bool]) -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    dout = torch.randn_like(leaves[0])

    def once() -> tuple[torch.Tensor, ...]:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = once()
    with torch.no_grad():
        for t in leaves:
            t.mul_(0.5)
    graph.replay()
    assert ours == [True] * 4
    for a, b in zip(found, once(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_in_a_graph(ours: list[bool]) -> None:
    q, k, v = inputs()
    F.scaled_dot_product_attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        known = F.scaled_dot_product_attention(q, k, v)
        new = F.scaled_dot_product_attention(q[:, :, :123], k, v)  # of a size that was not seen: by PyTorch's kernel
    graph.replay()
    assert ours == [True, True, False]
    assert right(known, q, k, v, layout="bhsd") and right(new, q[:, :, :123], k, v, layout="bhsd")


def test_dropout_and_packed_sequences_are_pytorchs(ours: list[bool]) -> None:
    q, k, v = inputs()
    dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(dropped, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)) and ours == []
    flat = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
    ends = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    out = torch.ops.aten._flash_attention_forward(*flat, ends, ends, 200, 200, 0.0, True, False)[0]
    for first, last in ((0, 100), (100, 300)):
        part = [t[None, first:last] for t in flat]
        assert right(out[None, first:last], *part, causal=True)
    assert ours == []


def test_without_it_pytorchs_kernel_is_there_again(ours: list[bool]) -> None:
    q, k, v = inputs()
    registry.restore_flash_attention_impl()
    assert right(F.scaled_dot_product_attention(q, k, v), q, k, v, layout="bhsd") and ours == []


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (40, 0)])
def test_packed_sequences(window: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """`varlen_attn` and its gradients, beside PyTorch's own kernel."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    served, serves = [], torch_impl._Packed.serves

    def told(packed: torch_impl._Packed, **what: bool) -> bool:
        served.append(serves(packed, **what))
        return served[-1]

    monkeypatch.setattr(torch_impl._Packed, "serves", told)
    lengths = torch.tensor([0, 130, 130, 400, 700], dtype=torch.int32, device="cuda")
    generator = torch.Generator("cuda").manual_seed(2)
    leaves = [torch.randn(700, 4, 64, device="cuda", generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    weight = torch.randn(700, 4, 64, device="cuda", generator=generator)

    def once() -> tuple[torch.Tensor, ...]:
        out = varlen.varlen_attn(*leaves, lengths, lengths, 300, 300, window_size=window)
        return out, *torch.autograd.grad((out.float() * weight).sum(), leaves)

    mine = once()
    assert served == [True, True]
    registry.restore_flash_attention_impl()
    for a, b in zip(mine, once(), strict=True):
        torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)
    assert len(served) == 2
