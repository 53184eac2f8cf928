"""The oracle: what it computes, what it lets pass, and above all what it does not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fagen.ops.attention import fallback, masks, reference
from fagen.ops.attention.reference import Semantics, attend, check

PLAIN = Semantics()


def inputs(sq: int = 70, sk: int = 90, dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 2) -> tuple:
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, heads, sq, 16), (1, kv_heads, sk, 16), (1, kv_heads, sk, 24))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pytorch_passes(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    verdict = check(out, None, q, k, v, PLAIN)
    assert verdict and verdict.error < 0.05


def test_the_reference_is_softmax_attention() -> None:
    q, k, v = (t.double() for t in inputs())
    out, lse = attend(q, k, v, None, PLAIN)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert (out - want).abs().max() < 1e-12
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-12


def test_softcap_and_alibi() -> None:
    q, k, v = (t.double() for t in inputs(5, 7))
    slopes = torch.tensor([0.5, 0.25, 1.0, 2.0])
    out, _ = attend(q, k, v, None, Semantics(softcap=2.0, scale=0.3), slopes)
    for h in range(4):
        for i in range(5):
            s = torch.stack([2 * torch.tanh(q[0, h, i] @ k[0, h // 2, j] * 0.3 / 2) for j in range(7)])
            s = s - slopes[h].double() * torch.tensor([abs(i + 2 - j) for j in range(7)])
            assert (out[0, h, i] - s.softmax(-1) @ v[0, h // 2]).abs().max() < 1e-12


def test_a_row_that_sees_nothing_is_zero_and_differentiable() -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(6, 3))
    seen = masks.dense(6, 3, window=(-1, 0))
    out, lse = attend(q, k, v, seen, PLAIN)
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -math.inf).all()
    out.square().sum().backward()
    for t in (q, k, v):
        assert t.grad.isfinite().all()
    assert (q.grad[:, :, :3] == 0).all()


def test_gradients() -> None:
    q, k, v = (t[:, :, :5, :3].double().requires_grad_() for t in inputs(5, 5))
    seen = masks.dense(5, 5, window=(2, 1))
    assert torch.autograd.gradcheck(lambda *t: attend(*t, seen, Semantics(softcap=1.5))[0], (q, k, v))


@pytest.mark.parametrize("size", [133120.0, 2.0**40])
def test_large_scores_stay_finite(size: float) -> None:
    """Beyond 2^24 a score's rounding is larger than one; its weight may all the same not exceed one."""
    q, k, v = (torch.full((1, 1, 3, 16), size, dtype=torch.bfloat16) for _ in range(3))
    v[0, 0, 1] = -1.0
    k[0, 0, 2] *= -1
    how: dict = {"layout": "bhsd", "causal": False, "window": (-1, -1), "intervals": None}
    how |= {"softcap": 0.0, "alibi_slopes": None, "scale": None}
    for out, lse in (
        attend(q, k, v, None, PLAIN),
        *(fallback.attend(q, k, v, want_lse=w, **how) for w in (True, False)),
    ):
        assert out.isfinite().all() and lse.isfinite().all()
        torch.testing.assert_close(out.float(), torch.full_like(out, (size - 1) / 2).float(), atol=0, rtol=0.02)


# ---- what must not pass -------------------------------------------------------------------------------------------


def good(semantics: Semantics = PLAIN, sq: int = 70, sk: int = 90, dtype: torch.dtype = torch.float32) -> tuple:
    q, k, v = inputs(sq, sk, dtype)
    seen = masks.dense(sq, sk, window=semantics.window)
    out, lse = attend(q, k, v, seen, semantics)
    assert check(out, lse, q, k, v, semantics)
    return out, lse, q, k, v


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 100.0])
@pytest.mark.parametrize("which", ["out", "lse"])
def test_one_bad_value_fails(value: float, which: str) -> None:
    out, lse, q, k, v = good()
    (out[0, 3, 69] if which == "out" else lse[0, 3])[-1] = value
    verdict = check(out, lse, q, k, v, PLAIN)
    assert not verdict and "head 3" in verdict.message and ("O" if which == "out" else "LSE") in verdict.message


def test_nan_everywhere_fails() -> None:
    out, lse, q, k, v = good()
    assert not check(out * math.nan, lse, q, k, v, PLAIN)
    assert not check(out, lse * math.nan, q, k, v, PLAIN)


def test_unmasked_rows_must_be_zero_and_minus_infinity() -> None:
    semantics = Semantics(window=(-1, 0))
    out, lse, q, k, v = good(semantics, 20, 10)
    assert (lse[:, :, :10] == -math.inf).all()
    broken = out.clone()
    broken[0, 0, 0, 0] = 1e-3
    assert not check(broken, lse, q, k, v, semantics)
    broken = lse.clone()
    broken[0, 0, 0] = -1e30
    assert not check(out, broken, q, k, v, semantics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_in_one_small_block_is_not_drowned(dtype: torch.dtype) -> None:
    """Ten times the block's own bound, in a tensor whose other rows are large."""
    q, k, v = inputs(130, 90, dtype)
    v[:, 0] *= 1000
    out, lse = attend(q, k, v, None, PLAIN)
    out[0, 3, 128:] *= 1 + 40 * torch.finfo(dtype).eps
    verdict = check(out, lse, q, k, v, PLAIN)
    assert not verdict and "head 3 rows 128-129" in verdict.message


def test_the_wrong_shape_and_the_wrong_semantics_fail() -> None:
    out, lse, q, k, v = good()
    assert not check(out[:, :, :-1], lse, q, k, v, PLAIN)
    assert not check(out, lse, q, k, v, Semantics(window=(-1, 0)))
    assert not check(out, lse, q, k, v, Semantics(scale=0.2))
    assert not check(out, lse, q, k, v, Semantics(softcap=5.0))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(["bhsd", "bshd"]))
def test_row_blocks_and_layouts_do_not_matter(sq: int, sk: int, layout: str) -> None:
    semantics = Semantics(window=(40, 0))
    q, k, v = inputs(sq, sk)
    out, lse = attend(q, k, v, masks.dense(sq, sk, window=semantics.window), semantics)
    if layout == "bshd":
        out, q, k, v = (t.transpose(1, 2) for t in (out, q, k, v))
    assert check(out, lse, q, k, v, semantics, layout=layout)


def test_long_sequences_are_checked_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_BYTES_A_STEP", 1)
    out, lse, q, k, v = good(sq=200)
    assert check(out, lse, q, k, v, PLAIN)
    out[0, 1, 199, 0] += 1
    assert "rows 192-199" in check(out, lse, q, k, v, PLAIN).message
