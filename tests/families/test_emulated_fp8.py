"""sm90_forward_fp8 on the CPU (tests/emulator), against the op's own check: products of e4m3, sums of 14 bits."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from fagen.ops.attention import fp8_launch, fp8_quantize
from fagen.ops.attention.fp8_calls import Params, make_params
from fagen.ops.attention.fp8_quantize import QuantizedQKV
from fagen.ops.oracle import Verdict
from fagen.runtime import helper, quantize
from fagen.runtime.kernel import Library
from fagen.target import known
from tests.support import emulated
from tests.support.fp8 import FAMILY, SCHEMES, Case, huge_scores, judged, make_call
from tests.support.fp8 import run as run_case
from tests.support.thorough import sample

HOPPER = known("sm_90")
SIZES = ((230, 230), (70, 300), (300, 130))
CASES = [
    Case("base", mask="none", head_dim=128, heads=2, kv_heads=1),
    Case("every_tile", mask="window", window=(70, 20)),
    Case("serial", mask="none", head_dim=192, head_dim_v=128, heads=2, kv_heads=1, changes=(("tile_n", 64),)),
    Case("each", head_dim=256, heads=2, kv_heads=1, changes=(("tile_n", 96), ("tile_m", 64), ("q_stages", 1))),
    Case("three_blocks", head_dim=48, head_dim_v=80),
    Case("turns", heads=2, kv_heads=1),
    Case("two_blocks"),
    Case("sections", dtype="fp16"),
    Case("each", mask="none", descales=False),
    Case("base", mask="window", window=(0, 0), softcap=5.0),
    Case("two_tiles", dtype="fp16", softcap=10.0),
    Case("deep", mask="none", head_dim=96),
    Case("turns", head_dim=128, heads=2, kv_heads=1),
    *(Case(f"n{n}") for n in (192, 224, 256)),
    Case("turns", mask="intervals", intervals="both4", block=64),
    Case("serial", mask="window", window=(70, 20), block=192),
    Case("every_tile", mask="intervals", intervals="lower1", block=192),
    Case("base", mask="intervals", intervals="lower2", head_dim=128, heads=2, kv_heads=1),
    Case("each", block=128, softcap=5.0, dtype="fp16"),
    Case("deep", mask="intervals", intervals="both2", head_dim=96, block=64, softcap=5.0),
    Case("three_blocks", mask="intervals", intervals="lower1", window=(150, 0), head_dim=48, head_dim_v=80),
    Case("sections", mask="intervals", intervals="both2", heads=2, kv_heads=1),
]


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


@functools.cache
def _source(case: Case) -> str:
    return emulated.source(FAMILY, case.problem, HOPPER, FAMILY.require(case.problem, HOPPER, case.config))


def _library(case: Case, folder: Path, text: str = "") -> Library:
    return emulated.build(text or _source(case), folder, Params)


def run(case: Case, folder: Path, rows: int, keys: int, seed: int = 0, text: str = "", batch: int = 1) -> Verdict:
    launch = functools.partial(
        emulated.launch, _library(case, folder, text), seed=seed, units=(3, 2, 5)[seed % 3], fill=make_params
    )
    return run_case(
        case, rows, keys, launch, seed=seed, batch=batch, device="cpu", layout="bhsd" if seed % 2 else "bshd"
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(CASES, every=5), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(SIZES):
        verdict = run(case, folder, rows, keys, seed)
        assert verdict, verdict.message


SMALL = Case("every_tile", mask="none", heads=2, kv_heads=2)


@pytest.mark.parametrize("block", [0, 64])
@pytest.mark.parametrize("scheme", ["base", "two_tiles"])
def test_the_largest_weight_is_one_however_large_the_scores(scheme: str, block: int, folder: Path) -> None:
    """Its key is in the tile that is visited first, or in the last one."""
    case = Case(scheme, mask="none", heads=2, kv_heads=1, block=block)
    launch = functools.partial(emulated.launch, _library(case, folder), fill=make_params)
    for top in (3, 99, 169):
        verdict = judged(huge_scores(case, 70, 170, top, device="cpu"), launch)
        assert verdict, verdict.message


BLOCKS = Case("two_blocks", mask="intervals", intervals="both2", heads=2, kv_heads=1, block=96 * 2)


@pytest.mark.parametrize("case", [SMALL, BLOCKS], ids=str)
def test_each_batch_and_head_has_its_descales(case: Case, folder: Path) -> None:
    for seed in range(2):
        verdict = run(case, folder, 70, 430, seed, batch=2)
        assert verdict, verdict.message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if (first_piece >= kPieces) return;", "return;"),  # keys of the block behind have the scale of the one before
        ("(C::kScaleBlock - key % C::kScaleBlock) / 8", "(C::kScaleBlock - key % C::kScaleBlock) / 8 + 1"),
        ("row_tile.coord.head, row / C::kScaleBlock)", "row_tile.coord.head, 0)"),
        ("kv_head, min(key, p.seqlen_k - 1) / C::kScaleBlock)", "kv_head, 0)"),
        ("plan<WholeBlocks<C>>", "plan<C>"),  # key tiles begin within blocks of values
        ("load_key_scale(first_key(keys));\n      wait_scores", "wait_scores"),
    ],
)
def test_what_is_wrong_with_blocks_is_found(folder: Path, old: str, new: str) -> None:
    text = _source(BLOCKS)
    assert old in text
    assert not all(run(BLOCKS, folder, 200, 430, seed, batch=2, text=text.replace(old, new)) for seed in range(2))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("factors[batch * t.stride[0] + head * t.stride[1] + block * t.stride[2]]", "factors[0]"),  # of another head
        ("* descale(given.descale_k, batch, kv_head);", ";"),
        ("low[0], low[1], high[0], high[1]", "low[0], high[0], low[1], high[1]"),  # weights of other keys
        ("sum *= 1.f / kWeightScale", "sum *= 1.f"),
        ("held[0] = smaller ? factor[0] : 1.f", "held[0] = 1.f"),  # O stays behind its maximum
    ],
)
def test_what_is_wrong_is_found(folder: Path, old: str, new: str) -> None:
    text = _source(SMALL)
    assert old in text
    assert not run(SMALL, folder, 70, 130, batch=2, text=text.replace(old, new))


def test_rows_that_see_no_keys(folder: Path) -> None:
    case = Case("two_blocks", heads=2, kv_heads=1)
    for rows, keys in ((200, 1), (1, 100)):
        verdict = run(case, folder, rows, keys)
        assert verdict, verdict.message
    call = make_call(case, 70, 1, 0, batch=1, device="cpu", layout="bshd")
    object.__setattr__(call, "k", call.k[:, :0])
    object.__setattr__(call, "v", call.v[:, :, :0])
    outputs = {n: torch.full(s, torch.nan, dtype=t) for n, (s, t) in call.output_types().items()}
    emulated.launch(_library(case, folder), call, outputs, fill=make_params)
    assert (outputs["out"] == 0).all() and (outputs["lse"] == -torch.inf).all()


@pytest.mark.slow
def test_what_promotion_saves(folder: Path) -> None:
    """Where all values are alike, sums of 14 bits lose with every product; those of a single tile hardly do."""
    lost = {}
    for promote in (0, 1):
        changes = (("tile_m", 64), ("promote", promote))
        case = Case("base", mask="none", dtype="fp16", heads=1, kv_heads=1, changes=changes)
        call = make_call(case, 1, 4096, 0, batch=1, device="cpu", layout="bshd")
        call.v.fill_(448.0)
        outputs = {n: torch.empty(s, dtype=t) for n, (s, t) in call.output_types().items()}
        emulated.launch(_library(case, folder), call, outputs, fill=make_params)
        want = call.dequantized().v[0, 0, 0, 0]
        lost[promote] = float((outputs["out"].float() - want).abs().max() / want)
    assert 4 * lost[1] < lost[0], lost


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES.values()} == set(knob.choices), knob.name


# ---- the kernels that make fp8 numbers -------------------------------------------------------------------------------


def _quantized_by_kernel(
    tensors: list[torch.Tensor], layout: str, incoherent: bool, folder: Path, block: int = 0,
    rotary: fp8_quantize.Rotary | None = None,
) -> QuantizedQKV:  # fmt: skip
    assert fp8_launch.serves(*tensors, rotary)
    text = emulated.translated(quantize.HELPER.rendered(HOPPER), "bf16")
    library = emulated.build(text, folder, quantize.Params)
    made, params, _alive = fp8_launch.prepare(quantize.Params, *tensors, layout, incoherent, block, rotary)
    library._library.emulator_begin(0, 3)
    helper.launch(library, params, tensors[0], "not made")
    return made


@pytest.mark.parametrize(
    ("dtype", "d", "dv", "layout", "incoherent", "block", "turned"),
    [
        (torch.bfloat16, 128, 64, "bshd", True, 0, None),
        (torch.float16, 64, 96, "bhsd", True, 64, ("halves", 64)),
        (torch.float32, 96, 256, "bshd", True, 0, ("halves", 32)),
        (torch.bfloat16, 80, 16, "bshd", True, 64, ("neighbours", 72)),
        (torch.bfloat16, 256, 128, "bhsd", True, 128, ("neighbours", 256)),
        (torch.float16, 48, 48, "bshd", False, 0, None),
    ],
)
def test_numbers_are_made_as_by_pytorch(
    folder: Path, dtype: torch.dtype, d: int, dv: int, layout: str, incoherent: bool, block: int,
    turned: tuple[str, int] | None,
) -> None:  # fmt: skip
    """The same scales and numbers, but where sums in another order fall to the other side of a rounding."""
    g = torch.Generator().manual_seed(d)
    shapes = ((2, 67, 4, d), (2, 131, 2, d), (2, 131, 2, dv))
    growth = [torch.tensor([0.1, 3.0])[:, None, None, None] * torch.linspace(1, 9, s[1])[:, None, None] for s in shapes]
    tensors = [torch.randn(shape, generator=g) * factor for shape, factor in zip(shapes, growth, strict=True)]
    tensors = [(t if layout == "bshd" else t.transpose(1, 2)).to(dtype) for t in tensors]
    rotary = None
    if turned is not None:
        pairs, columns = turned
        angles = torch.rand(140, columns // 2, generator=g) * 6
        rotary = fp8_quantize.Rotary(angles.cos(), angles.sin(), pairs == "neighbours")
    mine = _quantized_by_kernel(tensors, layout, incoherent, folder, block, rotary)
    want = fp8_quantize.by_torch(*tensors, layout, incoherent, block, rotary)
    for name in ("descale_q", "descale_k", "descale_v"):
        torch.testing.assert_close(getattr(mine, name), getattr(want, name), rtol=1e-5, atol=0)
    for name in ("q", "k", "v"):
        a, b = (getattr(x, name).float() for x in (mine, want))
        assert a.shape == b.shape
        off = (a - b).abs()
        assert (off <= torch.maximum(a.abs() / 8, torch.tensor(2.0**-9))).all(), name
        assert (off > 0).float().mean() < 0.01, name


def test_zeros_have_a_scale(folder: Path) -> None:
    tensors = [torch.zeros(1, n, 2, 16) for n in (3, 5, 5)]
    made = _quantized_by_kernel(tensors, "bshd", True, folder)
    assert all((t.float() == 0).all() for t in made[:3]) and all((t == 1).all() for t in made[3:6])


def test_what_the_kernels_do_not_take() -> None:
    q, k, v = (torch.zeros(1, 5, 2, 32) for _ in range(3))
    assert fp8_launch.serves(q, k, v)
    halves, neighbours = (fp8_quantize.Rotary(torch.zeros(5, 8), torch.zeros(5, 8), pairs) for pairs in (False, True))
    assert fp8_launch.serves(q, k, v, neighbours) and not fp8_launch.serves(q, k, v, halves)
    for others in (
        (q, k, v[..., :24]), (q.double(), k.double(), v.double()), (q.half(), k, v), (q[:, :0], k, v),
        (q[..., 1:17], k[..., 1:17], v), (q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)),
        (torch.zeros(1, 5, 2, 272), torch.zeros(1, 5, 2, 272), v),
    ):  # fmt: skip
        assert not fp8_launch.serves(*others)
