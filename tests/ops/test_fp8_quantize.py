"""fagen.quantize_qkv: scales, what spreads outliers, the rotary embedding before it, what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import fagen
from fagen.errors import InvalidArgument
from fagen.ops.attention import fp8_quantize
from fagen.ops.attention.fp8_call import E4M3, Fp8Call
from tests.support.fp8 import exact_attention, named_descales, qkv, relative_error


@pytest.mark.parametrize("d", [64, 96, 192])
def test_spreading_outliers_changes_no_product(d: int) -> None:
    q, k = torch.randn(5, d, dtype=torch.float64).float(), torch.randn(7, d)
    spread_q, spread_k = fp8_quantize.spread_outliers(q), fp8_quantize.spread_outliers(k)
    torch.testing.assert_close(spread_q @ spread_k.T, q @ k.T, rtol=1e-4, atol=1e-4)
    one = torch.zeros(1, d)
    one[0, 3] = 1.0
    part = d & -d
    assert fp8_quantize.spread_outliers(one).abs().max() == pytest.approx(part**-0.5)


def test_scales_are_of_each_batch_and_kv_head() -> None:
    q, k, v = qkv()
    x = fagen.quantize_qkv(q, k, v, incoherent=False)
    for numbers, descale, t in ((x.q, x.descale_q, q), (x.k, x.descale_k, k)):
        assert numbers.dtype == E4M3 and descale.shape == (2, 2)
        for b, h in itertools.product(range(2), range(2)):
            heads = slice(h * t.shape[2] // 2, (h + 1) * t.shape[2] // 2)
            assert float(descale[b, h] * 448) == pytest.approx(float(t[b, :, heads].float().abs().max()))
            assert numbers[b, :, heads].float().abs().max() == 448
            error = (numbers[b, :, heads].float() * descale[b, h] - t[b, :, heads].float()).abs()
            assert (error <= t[b, :, heads].float().abs() / 16 + descale[b, h] * 2**-9).all()


def test_zeros_and_no_keys_are_quantised() -> None:
    x = fagen.quantize_qkv(*(torch.zeros(1, n, 2, 16) for n in (3, 5, 5)))
    assert (fagen.attention(x.q, x.k, x.v, **named_descales(x)) == 0).all()
    x = fagen.quantize_qkv(torch.ones(1, 3, 2, 16), *(torch.ones(1, 0, 2, 16) for _ in range(2)))
    out, lse = fagen.attention(x.q, x.k, x.v, **named_descales(x), return_lse=True)
    assert out.shape == (1, 3, 2, 16) and (out == 0).all() and (lse == -torch.inf).all()


def test_spread_outliers_cost_less() -> None:
    """N(0, 1) and, of one number in a thousand, N(0, 100): see benchmarks/fp8_accuracy.py."""
    g = torch.Generator().manual_seed(0)

    def tensor() -> torch.Tensor:
        rare = torch.rand(1, 256, 2, 128, generator=g) < 0.001
        return torch.randn(rare.shape, generator=g) + 10 * torch.randn(rare.shape, generator=g) * rare

    q, k, v = tensor(), tensor(), tensor()
    want, errors = exact_attention(q, k, v)[0], []
    for incoherent in (False, True):
        x = fagen.quantize_qkv(q, k, v, incoherent=incoherent)
        errors.append(relative_error(fagen.attention(x.q, x.k, x.v, **named_descales(x)), want))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_comes_before_all_else(interleaved: bool, layout: str) -> None:
    """As complex numbers: the last 50 of 70 positions are those of q. The columns behind stay."""
    q, k, v = qkv()
    angles = torch.rand(80, 24) * 6

    def turned(t: torch.Tensor) -> torch.Tensor:
        first, rest = t[..., :48].float(), t[..., 48:].float()
        pairs = first.unflatten(-1, (24, 2)) if interleaved else first.unflatten(-1, (2, 24)).mT
        of_rows = torch.polar(torch.ones(80, 24), angles)[70 - t.shape[1] : 70, None]
        made = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * of_rows)
        return torch.cat([(made if interleaved else made.mT).flatten(-2), rest], dim=-1)

    given = [t if layout == "bshd" else t.transpose(1, 2) for t in (q, k, v)]
    rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
    mine = fagen.quantize_qkv(*given, layout=layout, **rotary)
    call = Fp8Call.of(*mine[:3], descales=tuple(named_descales(mine).values()), layout=layout).dequantized()
    for found, t in ((call.q, q), (call.k, k)):
        by_row = found if layout == "bshd" else found.transpose(1, 2)
        assert relative_error(by_row, fp8_quantize.spread_outliers(turned(t))) < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotary_sin": None}, "go together"),
        ({"rotary_sin": torch.zeros(70, 8)}, r"rotary_sin must be \(positions, 32 or less\)"),
        ({"rotary_cos": torch.zeros(70, 33)}, r"rotary_cos must be \(positions, 32 or less\)"),
        ({"rotary_cos": torch.zeros(69, 16), "rotary_sin": torch.zeros(69, 16)}, "69 positions"),
        ({"rotary_interleaved": 2}, "neither True nor False"),
        ({"rows": 71}, "the last positions of k"),
    ],
)
def test_a_rotary_embedding_that_is_wrong(change: dict[str, Any], words: str) -> None:
    q, k, v = qkv()
    rotary = {"rotary_cos": torch.zeros(70, 16), "rotary_sin": torch.zeros(70, 16), **change}
    q = q.repeat(1, 2, 1, 1)[:, : rotary.pop("rows", 50)]
    with pytest.raises((InvalidArgument, TypeError), match=words):
        fagen.quantize_qkv(q, k, v, **rotary)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q.to(E4M3), k, v), "16 bits or more"),
        (lambda q, k, v: (q[0], k, v), "4 dimensions"),
        (lambda q, k, v: (q, k[..., :32], v), "the head_dim of q"),
        (lambda q, k, v: (q, k, v[:, :9]), "the rows and heads of k"),
        (lambda q, k, v: (q[:, :, :3], k, v), "must divide"),
        (lambda q, k, v: (q, k, v[..., :12]), "a multiple of 8"),
    ],
)
def test_what_cannot_be_quantised(change, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        fagen.quantize_qkv(*change(*qkv()))


def test_a_block_is_a_multiple_of_64_rows() -> None:
    with pytest.raises(InvalidArgument, match="block=100 is not a multiple of 64"):
        fagen.quantize_qkv(*qkv(), block=100)
