"""fagen.attention on fp8 numbers: the order of v, descales, masks, layouts, what is refused."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import fagen
from fagen import env
from fagen.build import toolchain
from fagen.errors import InvalidArgument
from fagen.ops.attention import fp8_order
from fagen.ops.attention.fp8_call import E4M3, Fp8Call
from fagen.ops.attention.fp8_calls import check
from fagen.ops.attention.fp8_problem import Fp8Problem
from fagen.ops.attention.fp8_quantize import QuantizedQKV
from tests.support.fp8 import exact_attention, named_descales, qkv, relative_error

ORDER = """
#include <stdio.h>
#include "fagen/sm90/forward_fp8/value_order.cuh"
int main() {
  for (int place = 0; place < fagen::kBlockKeys; ++place)
    for (int column = 0; column < COLUMNS; ++column)
      printf("%d %d %d\\n", fagen::key_in_place(place), column, fagen::byte_of(place, column));
}
"""


# ---- the order of v --------------------------------------------------------------------------------------------------


def test_python_and_cuda_agree_about_the_order(tmp_path: Path) -> None:
    columns, source, program = 24, tmp_path / "order.cpp", tmp_path / "order"
    source.write_text(ORDER.replace("COLUMNS", str(columns)))
    headers = str(env.data_dir("templates") / "include")
    subprocess.run([str(toolchain.require_cxx()), "-std=c++17", "-I", headers, source, "-o", program], check=True)
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    v = torch.arange(32 * columns).reshape(1, 32, 1, columns)
    low, high = ((v // part % 128).to(torch.uint8) for part in (1, 128))
    block = [fp8_order.order_values(t.view(E4M3)).view(torch.uint8).flatten().long() for t in (low, high)]
    for key, column, byte in (map(int, line.split()) for line in told.splitlines()):
        assert block[0][byte] + 128 * block[1][byte] == key * columns + column
    assert len(told.splitlines()) == 32 * columns


def test_a_lane_has_the_weights_of_its_places() -> None:
    """A lane's scores are of keys 8 n + 2 (lane % 4) and the next; its places 4 (lane % 4) .. + 3 of each 16."""
    for lane in range(4):
        places = [16 * core + 4 * lane + i for core in range(2) for i in range(4)]
        keys = [8 * piece + 2 * lane + side for piece in range(4) for side in range(2)]
        assert [fp8_order.key_in_place(place) for place in places] == keys
    assert sorted(map(fp8_order.key_in_place, range(32))) == list(range(32))


@pytest.mark.parametrize("keys", [1, 32, 33, 95])
def test_order_and_back(keys: int) -> None:
    v = torch.randn(2, keys, 3, 40).to(E4M3)
    ordered = fp8_order.order_values(v)
    assert ordered.shape == (2, 3, -(-keys // 32), 40, 32)
    assert torch.equal(fp8_order.rows_of_values(ordered, keys).view(torch.uint8), v.view(torch.uint8))
    assert (fp8_order.rows_of_values(ordered, ordered.shape[2] * 32)[:, keys:].float() == 0).all()


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (20, 5)}, {"softcap": 3.0, "scale": 0.2}], ids=lambda o: "-".join(o)
)
def test_it_is_attention_on_what_the_numbers_stand_for(layout: str, options: dict) -> None:
    q, k, v = qkv(layout)
    x = fagen.quantize_qkv(q, k, v, layout=layout)
    out, lse = fagen.attention(x.q, x.k, x.v, **named_descales(x), layout=layout, return_lse=True, **options)
    want, want_lse = exact_attention(q, k, v, layout=layout, **options)
    assert out.dtype == torch.bfloat16 and out.shape == want.shape
    assert relative_error(out, want) < 0.06
    assert (lse - want_lse).abs().max() < 0.2
    descales = tuple(named_descales(x).values())
    verdict = check(Fp8Call.of(*x[:3], descales=descales, layout=layout, **options), {"out": out, "lse": lse})
    assert verdict, verdict.message


def _attend(x: QuantizedQKV, **options: Any) -> Any:
    return fagen.attention(x.q, x.k, x.v, **named_descales(x), descale_block=x.block, **options)


def _documents() -> torch.Tensor:
    """Of batch 0 and 1 others: int32 (2, 1, 70, 2)."""
    ids = (torch.arange(70)[None] >= torch.tensor([[17], [40]])).int()
    return fagen.masks.from_documents(ids, causal=False)


def test_blocks_have_their_scales() -> None:
    """Of small rows beside large ones a scale of all would leave e4m3 nothing."""
    q, k, v = qkv()
    k = torch.cat([k[:, :64] * 1e-6, k[:, 64:]], dim=1)
    x = fagen.quantize_qkv(q, k, v, block=64, incoherent=False)
    assert x.descale_q.shape == (2, 4, 1) and x.descale_k.shape == (2, 2, 2) and x.descale_v.shape == (2, 2)
    assert torch.equal(x.descale_k[:, :, 1], k[:, 64:].abs().float().amax((1, 3)) / 448.0)
    call = Fp8Call.of(*x[:3], descales=tuple(named_descales(x).values()), block=64, causal=True)
    whole = fagen.quantize_qkv(q, k, v, incoherent=False)
    assert relative_error(call.dequantized().k[:, :64], k[:, :64]) < 0.06 and (whole.k[:, :64].float() == 0).all()
    out, lse = _attend(x, causal=True, return_lse=True)
    want, want_lse = exact_attention(q, k, v, causal=True)
    assert relative_error(out, want) < 0.06 and (lse - want_lse).abs().max() < 0.2
    verdict = check(call, {"out": out, "lse": lse})
    assert verdict, verdict.message
    wrong = _attend(x._replace(descale_k=x.descale_k.flip(2)), causal=True, return_lse=True)
    assert not check(call, dict(zip(("out", "lse"), wrong, strict=True)))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_blocks_in_both_layouts(layout: str) -> None:
    x = fagen.quantize_qkv(*qkv(layout), layout=layout, block=64)
    want = _attend(fagen.quantize_qkv(*qkv(), block=64))
    assert torch.equal(
        _attend(x, layout=layout) if layout == "bshd" else _attend(x, layout=layout).transpose(1, 2), want
    )


def test_intervals_mask_as_in_16_bits() -> None:
    q, k, v = qkv()
    x, intervals = fagen.quantize_qkv(q, k, v), _documents()
    for options in ({}, {"causal": True}, {"window": (20, 3)}):
        out, lse = _attend(x, intervals=intervals, return_lse=True, **options)
        want, want_lse = exact_attention(q, k, v, intervals=intervals, **options)
        assert torch.equal(lse == -torch.inf, want_lse == -torch.inf) and relative_error(out, want) < 0.06
    assert not torch.equal(_attend(x, intervals=intervals), _attend(x))


def test_values_of_rows_are_brought_into_order() -> None:
    q, k, v = qkv()
    x = fagen.quantize_qkv(q, k, v)
    rows = fp8_order.rows_of_values(x.v, k.shape[1])
    want = fagen.attention(x.q, x.k, x.v, **named_descales(x))
    assert torch.equal(fagen.attention(x.q, x.k, rows, **named_descales(x)), want)
    turned = [t.transpose(1, 2) for t in (x.q, x.k, rows)]
    assert torch.equal(fagen.attention(*turned, **named_descales(x), layout="bhsd").transpose(1, 2), want)


def test_descales_are_tensors_or_numbers() -> None:
    q, k, v = (t.to(E4M3) for t in qkv())
    want = fagen.attention(q, k, v, descale_q=torch.full((2, 2), 2.0), descale_v=torch.full((2, 2), 0.5))
    assert torch.equal(fagen.attention(q, k, v, descale_q=2.0, descale_v=torch.tensor(0.5)), want)
    assert not torch.equal(fagen.attention(q, k, v), want)


def test_out_says_the_dtype() -> None:
    q, k, v = (t.to(E4M3) for t in qkv())
    out = torch.empty(2, 50, 4, 64, dtype=torch.float16)
    assert fagen.attention(q, k, v, out=out) is out
    assert relative_error(out, fagen.attention(q, k, v)) < 0.01


def test_sinks_join_the_sum() -> None:
    q, k, v = (t.to(E4M3) for t in qkv())
    sinks = torch.tensor([0.0, 1.0, 2.0, -3.0])
    out, lse = fagen.attention(q, k, v, sinks=sinks, return_lse=True)
    want, want_lse = exact_attention(q, k, v, sinks=sinks)
    assert relative_error(out, want) < 0.01
    torch.testing.assert_close(lse, want_lse)


def test_a_compiler_sees_ops() -> None:
    x = fagen.quantize_qkv(*qkv())
    quantize = torch.compile(lambda *t: fagen.quantize_qkv(*t), fullgraph=True, backend="eager")
    for mine, want in zip(quantize(*qkv())[:6], x[:6], strict=True):
        assert torch.equal(mine.float(), want.float())
    angles = torch.rand(70, 16)
    for block, rotary in ((0, (None, None, True)), (64, (angles.cos(), angles.sin(), False))):
        torch.library.opcheck(
            torch.ops.fagen.quantize_qkv.default, (*qkv("bhsd"), True, True, block, *rotary),
            test_utils=("test_faketensor",),
        )  # fmt: skip
    made = torch.compile(
        lambda x: fagen.attention(x.q, x.k, x.v, **named_descales(x), causal=True, return_lse=True),
        fullgraph=True, backend="eager",
    )  # fmt: skip
    for mine, want in zip(
        made(x), fagen.attention(*x[:3], **named_descales(x), causal=True, return_lse=True), strict=True
    ):
        assert torch.equal(mine, want)
    torch.library.opcheck(
        torch.ops.fagen.forward_fp8.default, (*x, False, -1, 0, 0.0, None, None, True),
        test_utils=("test_faketensor",),
    )  # fmt: skip


def test_a_compiler_sees_blocks_and_intervals() -> None:
    x, intervals = fagen.quantize_qkv(*qkv(), block=64), _documents()
    for causal in (False, True):
        attend = functools.partial(_attend, causal=causal, return_lse=True)
        made = torch.compile(lambda x, i, attend=attend: attend(x, intervals=i), fullgraph=True, backend="eager")
        want = attend(x, intervals=intervals)
        assert all(torch.equal(a, b) for a, b in zip(made(x, intervals), want, strict=True))


@pytest.mark.parametrize("d", [64, 256])
def test_the_check_allows_what_the_tensor_cores_lose_and_no_more(d: int) -> None:
    """2.8 units of 2^-13 of sum |q k| were seen on a GPU; 6 are a fault, in the LSE and in the weights of keys."""
    x = fagen.quantize_qkv(*qkv(d=d))
    call = Fp8Call.of(*x[:3], descales=tuple(named_descales(x).values()))
    whole = call.dequantized()
    q, k, v = whole.bhsd()
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    unit = 2.0**-13 * (q.abs() @ k.abs().mT) * d**-0.5

    def outputs(lost: torch.Tensor, tanh: float = 0.0) -> dict[str, torch.Tensor]:
        scores = q @ k.mT * d**-0.5 + lost
        scores = 10.0 * torch.tanh(scores / 10.0) * (1 + tanh) if tanh else scores
        out = torch.softmax(scores, -1) @ v
        return {"out": out.transpose(1, 2).bfloat16(), "lse": scores.logsumexp(-1)}

    assert check(call, outputs(2.8 * unit)) and check(call, outputs(-2.8 * unit))
    assert "LSE" in check(call, outputs(6 * unit)).message
    assert "LSE" in check(call, outputs(-6 * unit)).message
    assert not check(call, {"out": outputs(0 * unit)["out"] * 1.2, "lse": outputs(0 * unit)["lse"]})
    capped = dataclasses.replace(call, softcap=10.0)
    assert check(capped, outputs(2.8 * unit, 2.0**-11)) and check(capped, outputs(-2.8 * unit, -(2.0**-11)))
    assert "LSE" in check(capped, outputs(6 * unit, 2.0**-10)).message


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alibi_slopes": torch.ones(4)}, "no alibi_slopes"),
        ({"dropout_p": 0.1}, "no dropout_p"),
        ({"intervals": torch.zeros(1, 1, 71, 1, dtype=torch.int32)}, "intervals must have shape"),
        ({"intervals": torch.zeros(1, 1, 70, 3, dtype=torch.int32)}, "they may have 1, 2 or 4"),
        ({"descale_block": 32}, "descale_block=32 is not a multiple of 64"),
        ({"descale_block": -64}, "descale_block=-64 is not"),
        ({"descale_block": 64, "descale_q": torch.ones(2, 2)}, r"descale_q must be a number or float32 \(2, 4, 1\)"),
        ({"descale_block": 64, "descale_k": torch.ones(2, 2, 1)}, r"descale_k must be a number or float32 \(2, 2, 2\)"),
        ({"descale_block": 64, "descale_v": torch.ones(2, 2, 2)}, r"descale_v must be a number or float32 \(2, 2\)"),
        ({"descale_q": torch.ones(2, 4)}, r"descale_q must be a number or float32 \(2, 2\)"),
        ({"descale_k": torch.ones(2, 2).double()}, "descale_k must be"),
        ({"descale_v": "1"}, "descale_v"),
        ({"descale_v": 0.0}, "must be positive"),
        ({"layout": ["bshd"]}, "layout"),
        ({"out": torch.empty(2, 50, 4, 64)}, "bfloat16 or float16"),
        ({"layout": "sbhd"}, "layout"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_what_it_refuses(options: dict, words: str) -> None:
    q, k, v = (t.to(E4M3) for t in qkv())
    with pytest.raises((InvalidArgument, TypeError), match=words):
        fagen.attention(q, k, v, **options)


def test_tensors_that_contradict_each_other_are_refused() -> None:
    q, k, v = qkv()
    x = fagen.quantize_qkv(q, k, v)
    cases = [
        ((q.to(E4M3), k, x.v), "k must be float8_e4m3fn"),
        ((x.q, x.k[:, :60], x.v), "v must be"),
        ((x.q, x.k, x.v[:, :1]), "v must be"),
        ((x.q[:1], x.k, x.v), "k must have the batch"),
        ((x.q[:, :, :3], x.k, x.v), "must divide"),
        ((x.q, x.k, x.v[..., :16]), "v must be"),
        ((x.q[0], x.k, x.v), "4 dimensions"),
    ]
    for tensors, words in cases:
        with pytest.raises(InvalidArgument, match=words):
            fagen.attention(*tensors)
    for only_fp8 in ({"descale_q": 1.0}, {"descale_block": 64}, {"descale_block": torch.zeros(3)}):
        with pytest.raises(InvalidArgument, match="descales are of fp8 numbers"):
            fagen.attention(q, k, v, **only_fp8)


@pytest.mark.parametrize("name", ["alibi", "dropout", "tf32"])
def test_a_problem_has_no(name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        Fp8Problem(**{name: True})
    with pytest.raises(InvalidArgument, match="fp32"):
        Fp8Problem(dtype="fp32")
    for problem in (
        Fp8Problem(mask="causal"),
        Fp8Problem(scale_block=128),
        Fp8Problem(mask="intervals", intervals="both2"),
    ):
        assert Fp8Problem.from_dict(problem.to_dict()) == problem
    assert "scale_block" not in Fp8Problem().to_dict()  # as it was before there were any
    assert Fp8Problem(scale_block=128).static_key.endswith("/scales128")
    with pytest.raises(InvalidArgument, match="scale_block=100"):
        Fp8Problem(scale_block=100)
