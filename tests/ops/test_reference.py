"""The oracle: what it computes, what it lets pass, and above all what it does not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fagen.ops.attention import fallback, reference
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.reference import Verdict


def made(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> AttentionCall:
    return AttentionCall.of(q, k, v, layout="bhsd", **options)


def attend(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.attend(call, call.bhsd(), reference.visible(call))


def check(out: torch.Tensor, lse: torch.Tensor | None, call: AttentionCall) -> Verdict:
    return reference.check(call, {"out": out} if lse is None else {"out": out, "lse": lse})


def inputs(sq: int = 70, sk: int = 90, dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 2) -> tuple:
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, heads, sq, 16), (1, kv_heads, sk, 16), (1, kv_heads, sk, 24))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pytorch_passes(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    verdict = check(out, None, made(q, k, v))
    assert verdict and verdict.error < 0.05


def test_the_reference_is_softmax_attention() -> None:
    q, k, v = (t.double() for t in inputs())
    out, lse = attend(made(q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert (out - want).abs().max() < 1e-12
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-12


def test_softcap_and_alibi() -> None:
    q, k, v = (t.double() for t in inputs(5, 7))
    slopes = torch.tensor([0.5, 0.25, 1.0, 2.0])
    out, _ = attend(made(q, k, v, softcap=2.0, scale=0.3, alibi_slopes=slopes))
    for h in range(4):
        for i in range(5):
            s = torch.stack([2 * torch.tanh(q[0, h, i] @ k[0, h // 2, j] * 0.3 / 2) for j in range(7)])
            s = s - slopes[h].double() * torch.tensor([abs(i + 2 - j) for j in range(7)])
            assert (out[0, h, i] - s.softmax(-1) @ v[0, h // 2]).abs().max() < 1e-12


def test_a_row_that_sees_nothing_is_zero_and_differentiable() -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(6, 3))
    out, lse = attend(made(q, k, v, causal=True))
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -math.inf).all()
    out.square().sum().backward()
    for t in (q, k, v):
        assert t.grad.isfinite().all()
    assert (q.grad[:, :, :3] == 0).all()


def test_gradients() -> None:
    q, k, v = (t[:, :, :5, :3].double().requires_grad_() for t in inputs(5, 5))
    assert torch.autograd.gradcheck(lambda *t: attend(made(*t, window=(2, 1), softcap=1.5))[0], (q, k, v))


@pytest.mark.parametrize("size", [133120.0, 2.0**40])
def test_large_scores_stay_finite(size: float) -> None:
    """Beyond 2^24 a score's rounding is larger than one; its weight may all the same not exceed one."""
    q, k, v = (torch.full((1, 1, 3, 16), size, dtype=torch.bfloat16) for _ in range(3))
    v[0, 0, 1] = -1.0
    k[0, 0, 2] *= -1
    computed = [fallback.attend(made(q, k, v, return_lse=wanted)) for wanted in (True, False)]
    for out, lse in (attend(made(q, k, v)), *computed):
        assert out.isfinite().all() and lse.isfinite().all()
        torch.testing.assert_close(out.float(), torch.full_like(out, (size - 1) / 2).float(), atol=0, rtol=0.02)


# ---- what must not pass -------------------------------------------------------------------------------------------


def good(sq: int = 70, sk: int = 90, **options: Any) -> tuple[torch.Tensor, torch.Tensor, AttentionCall]:
    call = made(*inputs(sq, sk), **options)
    out, lse = attend(call)
    assert check(out, lse, call)
    return out, lse, call


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 100.0])
@pytest.mark.parametrize("which", ["out", "lse"])
def test_one_bad_value_fails(value: float, which: str) -> None:
    out, lse, call = good()
    (out[0, 3, 69] if which == "out" else lse[0, 3])[-1] = value
    verdict = check(out, lse, call)
    assert not verdict and "head 3" in verdict.message and ("O" if which == "out" else "LSE") in verdict.message


def test_nan_everywhere_fails() -> None:
    out, lse, call = good()
    assert not check(out * math.nan, lse, call)
    assert not check(out, lse * math.nan, call)


def test_unmasked_rows_must_be_zero_and_minus_infinity() -> None:
    out, lse, call = good(20, 10, causal=True)
    assert (lse[:, :, :10] == -math.inf).all()
    broken = out.clone()
    broken[0, 0, 0, 0] = 1e-3
    assert not check(broken, lse, call)
    broken = lse.clone()
    broken[0, 0, 0] = -1e30
    assert not check(out, broken, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_in_one_small_block_is_not_drowned(dtype: torch.dtype) -> None:
    """Ten times the block's own bound, in a tensor whose other rows are large."""
    q, k, v = inputs(130, 90, dtype)
    v[:, 0] *= 1000
    call = made(q, k, v)
    out, lse = attend(call)
    out[0, 3, 128:] *= 1 + 40 * torch.finfo(dtype).eps
    verdict = check(out, lse, call)
    assert not verdict and "head 3 rows 128-129" in verdict.message


def test_the_wrong_shape_and_other_arguments_fail() -> None:
    out, lse, call = good()
    assert not check(out[:, :, :-1], lse, call)
    for other in ({"causal": True}, {"scale": 0.2}, {"softcap": 5.0}, {"alibi_slopes": torch.ones(4)}):
        assert not check(out, lse, made(*call.bhsd(), **other)), other


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(["bhsd", "bshd"]))
def test_row_blocks_and_layouts_do_not_matter(sq: int, sk: int, layout: str) -> None:
    q, k, v = inputs(sq, sk)
    out, lse = attend(made(q, k, v, window=(40, 0)))
    if layout == "bshd":
        out, q, k, v = (t.transpose(1, 2) for t in (out, q, k, v))
    assert check(out, lse, AttentionCall.of(q, k, v, layout=layout, window=(40, 0)))


def test_tf32_is_the_nearest_number_of_eleven_bits() -> None:
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), torch.tensor([0.0, 1.0, -2.0])])
    rounded = reference.rounded_to_tf32(x)
    assert (rounded.view(torch.int32) & 0x1FFF == 0).all() and ((rounded - x).abs() <= x.abs() * 2.0**-11).all()
    assert torch.equal(reference.rounded_to_tf32(rounded), rounded)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(reference.rounded_to_tf32(odd).nan_to_num(5.0), odd.nan_to_num(5.0))
    assert torch.equal(reference.rounded_to_tf32(x.double()), x.double())


def test_a_call_that_allows_tf32_may_be_off_by_as_much() -> None:
    q, k, v = inputs()
    exact, allows = made(q, k, v, return_lse=True), dataclasses.replace(made(q, k, v, return_lse=True), tf32=True)
    rounded = [reference.rounded_to_tf32(t) for t in (q, k, v)]
    out, lse = attend(dataclasses.replace(exact, q=rounded[0], k=rounded[1], v=rounded[2]))
    assert check(out, lse, allows) and not check(out, lse, exact)
    assert check(*attend(exact), allows) and allows.problem.tf32
    out[0, 1, 3] += 0.02
    assert not check(out, lse, allows)


def test_the_lse_of_a_single_key_may_be_off_by_the_rounding_of_its_score() -> None:
    """PyTorch's own error of that one number may be nothing, as here, where its operands need no rounding."""
    q, k, v = map(reference.rounded_to_tf32, inputs(1, 1))
    allows = dataclasses.replace(made(q, k, v, return_lse=True), tf32=True)
    q, k = reference.rounded_to_tf32(q * 0.36) / 0.36, reference.rounded_to_tf32(k)  # as a kernel that scales q first
    out, lse = attend(dataclasses.replace(allows, q=q, k=k))
    assert check(out, lse, allows)
    assert not check(out, lse + 0.01, allows)


def test_long_sequences_are_checked_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_BYTES_A_STEP", 1)
    out, lse, call = good(sq=200)
    assert check(out, lse, call)
    out[0, 1, 199, 0] += 1
    assert "rows 192-199" in check(out, lse, call).message


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("planes", [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize("slopes", [(4,), (1, 4), (3, 4)])
def test_a_part_is_what_the_whole_has_there(layout: str, planes: tuple[int, int], slopes: tuple[int, ...]) -> None:
    """Of one head, and of all that share a kv head, with the mask and the slopes that are theirs."""
    q, k, v = (torch.randn(3, heads, rows, 16) for heads, rows in ((4, 20), (2, 30), (2, 30)))
    bounds = torch.randint(0, 21, (*planes, 30, 2), dtype=torch.int32)
    whole = made(q, k, v, intervals=bounds, alibi_slopes=torch.rand(slopes), softcap=2.0, return_lse=True)
    out, lse = attend(whole)
    if layout == "bshd":
        q, k, v, out = (t.transpose(1, 2) for t in (q, k, v, out))
        options = {"intervals": bounds, "alibi_slopes": whole.alibi_slopes, "softcap": 2.0}
        whole = AttentionCall.of(q, k, v, **options)
    for b, heads in ((0, slice(0, 1)), (2, slice(3, 4)), (1, slice(2, 4)), (2, slice(0, 2))):
        small, outputs = reference.part(whole, {"out": out, "lse": lse}, b, heads)
        assert (small.batch, small.heads, small.kv_heads) == (1, heads.stop - heads.start, 1)
        assert reference.check(small, outputs)
        outputs["lse"] = outputs["lse"] + 1e-2
        assert not reference.check(small, outputs)
