"""`fagen.flash_attn_varlen_func`: packed sequences give what each gives alone, forward and backward."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import fagen
from fagen.errors import InvalidArgument, UnsupportedProblem
from fagen.ops.attention import fp8_order, masks

LENGTHS = [(33, 33), (0, 0), (1, 1), (70, 70), (15, 15)]
APART = [(33, 47), (0, 5), (5, 0), (1, 1), (40, 20), (12, 90)]


def cumulated(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(lengths: list[tuple[int, int]], heads: int = 4, kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(11)
    rows, keys = (sum(pair[i] for pair in lengths) for i in (0, 1))
    shapes = ((rows, heads, 16), (keys, kv_heads, 16), (keys, kv_heads, 16))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def alone(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[tuple[int, int]], **how: Any
) -> torch.Tensor:
    """Each sequence by itself, in float64 and by the definition: a dense mask."""
    outs, row, key = [], 0, 0
    for rows, keys in lengths:
        mine, theirs, values = q[row : row + rows], k[key : key + keys], v[key : key + keys]
        row, key = row + rows, key + keys
        bounds = tuple(-1 if b is None else b for b in how.get("window", (None, None)))
        bounds = (bounds[0], 0) if how.get("causal") else bounds
        seen = masks.dense(rows, keys, window=bounds)[0, 0]
        theirs, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (theirs, values))
        scores = torch.einsum("qhd,khd->hqk", mine, theirs) * 0.25
        if how.get("slopes") is not None:
            distance = (torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)).abs()
            scores = scores - how["slopes"].double()[:, None, None] * distance
        weights = torch.exp(scores).masked_fill(~seen, 0.0)
        total = weights.sum(-1, keepdim=True)
        outs.append(torch.einsum("hqk,khd->qhd", weights / torch.where(total == 0, 1, total), values))
    return torch.cat(outs)


WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (9, 3)},
    "causal window": {"window": (9, None), "causal": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("same", [True, False])
def test_a_pack_is_its_sequences(same: bool, way: str) -> None:
    how, lengths = WAYS[way], LENGTHS if same else APART
    cu_q, cu_k = (cumulated([pair[i] for pair in lengths]) for i in (0, 1))
    tensors = packed(lengths)
    leaves, exact = ([t.to(d).requires_grad_() for t in tensors] for d in (torch.float32, torch.float64))
    window = tuple(-1 if bound is None else bound for bound in how.get("window", (None, None)))
    out = fagen.flash_attn_varlen_func(
        *leaves, cu_q, cu_q if same else cu_k, 90, 90, causal=how.get("causal", False), window_size=window
    )
    want = alone(*exact, lengths, **how)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(out, leaves, dout)
    for mine, theirs in zip(got, torch.autograd.grad(want, exact, dout.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=2e-5)


def test_the_lse_and_alibi() -> None:
    q, k, v = packed(LENGTHS)
    cu, slopes = cumulated([rows for rows, _ in LENGTHS]), torch.tensor([0.5, 0.1, 0.2, 1.0])
    out, lse, nothing = fagen.flash_attn_varlen_func(
        q, k, v, cu, cu, 70, 70, causal=True, alibi_slopes=slopes, return_attn_probs=True
    )
    want = alone(q.double(), k.double(), v.double(), LENGTHS, causal=True, slopes=slopes)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    assert nothing is None and lse.shape == (4, q.shape[0]) and lse.isfinite().all()


def test_rows_behind_the_last_sequence_see_nothing() -> None:
    q, k, v = packed([(40, 40)])
    cu = torch.tensor([0, 33], dtype=torch.int32)
    out = fagen.flash_attn_varlen_func(q, k, v, cu, cu, 33, 33)
    assert (out[33:] == 0).all() and (out[:33] != 0).any(-1).all()


def test_lengths_that_are_written_into_count_and_inference_mode_is_fine() -> None:
    q, k, v = packed(LENGTHS)
    cu = cumulated([rows for rows, _ in LENGTHS])
    first = fagen.flash_attn_varlen_func(q, k, v, cu, cu, 70, 70)
    with torch.inference_mode():
        again = cu.clone()
        assert torch.equal(fagen.flash_attn_varlen_func(q, k, v, again, again, 70, 70), first)
    cu[1] = 20
    assert not torch.equal(fagen.flash_attn_varlen_func(q, k, v, cu, cu, 70, 70), first)


def test_it_has_the_arguments_of_flash_attention() -> None:
    names = (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size softcap "
        "alibi_slopes deterministic return_attn_probs block_table"
    )
    found = inspect.signature(fagen.flash_attn_varlen_func).parameters.values()
    assert " ".join(p.name for p in found if p.kind is not inspect.Parameter.KEYWORD_ONLY) == names


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("q must have shape (total, heads, head_dim)", lambda a: {"q": a["q"][None]}),
        ("cu_seqlens_q must be int32", lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].float()}),
        ("cu_seqlens_k must be int32", lambda a: {"cu_seqlens_k": a["cu_seqlens_k"][:1]}),
        ("as many sequences", lambda a: {"cu_seqlens_k": a["cu_seqlens_k"][:-1]}),
        ("cu_seqlens_q is on meta", lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].to("meta")}),
        ("cu_seqlens_q", lambda a: {"cu_seqlens_q": [0, 5]}),
        ("max_seqlen_q", lambda a: {"max_seqlen_q": "long"}),
        ("window_size", lambda a: {"window_size": 3}),
    ],
)
def test_what_is_wrong_is_said(words: str, change: Any) -> None:
    q, k, v = packed(LENGTHS)
    cu = cumulated([rows for rows, _ in LENGTHS])
    given = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 70, "max_seqlen_k": 70,
    }  # fmt: skip
    with pytest.raises((InvalidArgument, TypeError)) as caught:
        fagen.flash_attn_varlen_func(**(given | change(given)))
    assert words in str(caught.value)


@pytest.mark.parametrize("block", [0, 64])
@pytest.mark.parametrize("same", [True, False])
def test_fp8_numbers_are_packed_as_others(same: bool, block: int) -> None:
    """The sequences of a pack share its scales; each is right by itself, and v may be of rows."""
    lengths = LENGTHS if same else APART
    cu_q, cu_k = (cumulated([pair[i] for pair in lengths]) for i in (0, 1))
    tensors = packed(lengths)
    x = fagen.quantize_qkv(*(t[None] for t in tensors), block=block)
    descales = {name: getattr(x, name) for name in ("descale_q", "descale_k", "descale_v")} | {"descale_block": block}
    cu = (cu_q, cu_q if same else cu_k, 90, 90)
    out, lse, _ = fagen.flash_attn_varlen_func(
        x.q[0], x.k[0], x.v, *cu, causal=True, return_attn_probs=True, **descales
    )  # fmt: skip
    want = alone(*(t.double() for t in tensors), lengths, causal=True)
    assert out.dtype == torch.bfloat16 and out.shape == want.shape and lse.shape == (4, out.shape[0])
    assert (out - want).square().mean().sqrt() < 0.06 * want.square().mean().sqrt()
    assert torch.equal((out == 0).all(-1), (want == 0).all(-1))
    rows = fp8_order.rows_of_values(x.v, tensors[1].shape[0])[0]
    again = fagen.flash_attn_varlen_func(x.q[0], x.k[0], rows, *cu, causal=True, **descales)
    assert torch.equal(again, out)
    with pytest.raises(InvalidArgument, match="descale_q must be a number or float32"):
        fagen.flash_attn_varlen_func(x.q[0], x.k[0], x.v, *cu, descale_q=torch.ones(len(lengths), 2))


def test_dropout_is_that_of_the_packed_call() -> None:
    q, k, v = packed(LENGTHS)
    cu = cumulated([rows for rows, _ in LENGTHS])
    given = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 70, "max_seqlen_k": 70}
    torch.manual_seed(1)
    got = fagen.flash_attn_varlen_func(q, k, v, **given, dropout_p=0.2)
    torch.manual_seed(1)
    bounds = fagen.masks.from_cu_seqlens(cu, cu, q.shape[0], k.shape[0])
    want = fagen.attention(q[None], k[None], v[None], intervals=bounds, dropout_p=0.2)[0]
    assert torch.equal(got, want) and not torch.equal(got, fagen.flash_attn_varlen_func(q, k, v, **given))


def test_what_is_not_served_is_said() -> None:
    q, k, v = packed(LENGTHS)
    cu = cumulated([rows for rows, _ in LENGTHS])
    for words, how in (
        ("paged", {"block_table": cu}),
        ("ALiBi", {"alibi_slopes": torch.ones(4), "cu_seqlens_k": cu.clone()}),
    ):  # fmt: skip
        given = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 70, "max_seqlen_k": 70, **how}
        with pytest.raises(UnsupportedProblem, match=words):
            fagen.flash_attn_varlen_func(q, k, v, **given)
