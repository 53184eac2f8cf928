"""sm80_forward on a GPU against the oracle: every knob value, ragged sizes, all masks, GQA, head dims."""

from __future__ import annotations

import pytest
import torch

from tests.support import cases
from tests.support.calls import right
from tests.support.cases import FAMILY, SCHEMES, Case, run

# below, at and above the edges of 16, 32, 64, 128 and 256; q longer than k, k longer than q, one row, one key
EDGES = ((1, 1), (1, 77), (15, 17), (64, 64), (63, 65), (129, 127), (200, 200), (257, 255), (129, 333), (333, 129))

SCHEME_CASES = [
    Case(name, mask=mask, sizes=EDGES)
    for name in SCHEMES
    for mask in ("causal", "none")
    if mask == "causal" or SCHEMES[name].block_order in ("ascending", "sectioned")
]

_WALKS = ("base", "one_stage", "overlap", "overlap_deep", "kv_outer", "split_k", "pairs", "two_warps")
WINDOW_CASES = [
    Case(name, mask="window", window=window, sizes=((300, 300), (300, 200), (100, 400)))
    for name in _WALKS
    for window in ((50, 20), (10, 0), (70, -1), (-1, 5), (0, 0))
]
_INTERVALS = (
    ("lower1", (-1, 0)), ("lower1", (-1, -1)), ("lower2", (-1, 0)), ("both2", (-1, -1)), ("both4", (-1, -1)),
    ("both4", (100, 30)),
)  # fmt: skip
INTERVAL_CASES = [
    Case(name, mask="intervals", intervals=kind, window=window, sizes=((300, 300), (300, 1500), (77, 40)))
    for name in _WALKS
    for kind, window in _INTERVALS
]

_DIMS = (
    (8, 0), (16, 0), (32, 0), (40, 0), (64, 128), (72, 0), (80, 0), (96, 0), (112, 0), (128, 0), (192, 128), (192, 0),
    (224, 0), (256, 0), (256, 64),
)  # fmt: skip
# the other settings turn at other rates, so that sixty cases see most pairs of them
DIM_CASES = [
    Case(
        "base", mask=mask, dtype=dtype, head_dim=d, head_dim_v=dv, changes=(("smem_layout", layout),), heads=h,
        kv_heads=hk, window=(40, 10) if mask == "window" else (-1, -1), sizes=((150, 170),),
    )
    for (d, dv), dtype, mask, layout, (h, hk) in zip(
        _DIMS * 4,
        ("bf16", "fp16") * 30,
        ("causal", "none", "window") * 20,
        ("swizzled", "swizzled", "padded", "padded") * 15,
        ((4, 1), (6, 2), (3, 3)) * 20,
        strict=True,
    )
]  # fmt: skip
_PAIRS = (
    (128, 0, "swizzled", 64), (256, 0, "swizzled", 32), (256, 0, "swizzled", 64), (256, 128, "swizzled", 96),
    (192, 0, "padded", 32), (64, 32, "padded", 96),
)  # fmt: skip
PAIR_CASES = [
    Case(
        "pairs", mask=mask, head_dim=d, head_dim_v=dv, dtype=dtype, sizes=((150, 170), (64, 64)),
        changes=(("smem_layout", layout), ("tile_n", n)),
    )
    for d, dv, layout, n in _PAIRS
    for mask, dtype in (("causal", "bf16"), ("none", "fp16"))
]  # fmt: skip
GQA_CASES = [
    Case(name, heads=h, kv_heads=hk, mask=mask, sizes=((130, 190),))
    for name in ("base", "kv_outer", "split_k", "pairs")
    for h, hk in ((8, 8), (8, 4), (8, 1), (6, 3))
    for mask in ("causal", "none")
]
SCORE_CASES = [
    Case("base", softcap=20.0, mask="none"),
    Case("base", softcap=5.0, alibi=True),
    Case("base", alibi=True, mask="none"),
    Case("overlap", softcap=20.0, alibi=True),
    Case("kv_outer", alibi=True),
    Case("split_k", softcap=20.0),
    Case("base", mask="window", window=(30, 30), alibi=True),
    Case("base", mask="intervals", intervals="both4", softcap=10.0),
]
DROPOUT_CASES = [
    Case(name, dropout=0.1, mask=mask, sizes=((200, 230), (70, 300)))
    for name in ("base", "overlap", "kv_outer", "split_k", "pairs", "two_warps")
    for mask in ("none", "causal")
]
_FEW = ((1, 5000), (9, 700), (70, 2000), (130, 4100), (300, 900), (700, 5))
SPLIT_CASES = [
    Case(name, mask=mask, intervals=kind, window=window, heads=2, kv_heads=1, sizes=_FEW)
    for name in ("split", "split_overlap", "split_one_stage")
    for mask, kind, window in (
        ("none", "", (-1, -1)), ("causal", "", (-1, -1)), ("window", "", (700, 30)), ("intervals", "both4", (900, 30)),
        ("intervals", "lower1", (-1, 0)),
    )
    if mask != "none" or name != "split_overlap"  # its order wants a mask
]  # fmt: skip
SPLIT_CASES += [
    Case("split", softcap=10.0, alibi=True, sizes=_FEW),
    Case("split", dropout=0.1, mask="none", sizes=_FEW),
    Case("split", head_dim=50, aligned=False, sizes=_FEW),
    Case("split", head_dim=192, head_dim_v=128, dtype="fp16", sizes=_FEW),
    Case("split", head_dim=256, mask="none", sizes=_FEW),
    *(Case("split", magnitude=m, sizes=_FEW[1:3]) for m in (30.0, 133120.0)),
]
UNALIGNED_CASES = [
    Case("base", aligned=False, head_dim=d, mask=mask, dtype=dtype, sizes=((150, 90), (33, 65)))
    for d, mask, dtype in ((50, "causal", "bf16"), (64, "none", "fp16"), (33, "none", "bf16"), (1, "causal", "bf16"))
]
LARGE_CASES = [
    Case(name, magnitude=m)
    for name in ("base", "rescale_each", "overlap", "kv_outer", "split_k", "pairs")
    for m in (8.0, 30.0, 3e3, 133120.0)  # of the last, scores are beyond 2^31
]

ALL = [
    *SCHEME_CASES,
    *WINDOW_CASES,
    *INTERVAL_CASES,
    *DIM_CASES,
    *PAIR_CASES,
    *GQA_CASES,
    *SCORE_CASES,
    *DROPOUT_CASES,
    *SPLIT_CASES,
    *UNALIGNED_CASES,
    *LARGE_CASES,
]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    cases.build_all(ALL)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_oracle(case: Case) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = run(case, rows, keys, seed=seed)
        assert verdict, f"{rows}x{keys}: {verdict.message}"


@pytest.mark.parametrize("name", ["base", "kv_outer", "split_k"])
def test_other_layout(name: str) -> None:
    verdict = run(Case(name), 200, 200, layout="bhsd")
    assert verdict, verdict.message


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        used = {scheme[knob.name] for scheme in SCHEMES.values()}
        assert used == set(knob.choices), knob.name


def _outputs(name: str, mask: str) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(7)
    q, k, v = (torch.randn(2, 500, 4, 64, device="cuda", generator=g).bfloat16() for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(2, 4, 500, device="cuda")
    case = Case(name, mask=mask, kv_heads=4)
    cases.kernel_of(case).launch(case.call(q, k, v), {"out": out, "lse": lse})
    return out.float(), lse


@pytest.mark.parametrize("mask", ["causal", "none"])
@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "base"])
def test_the_sides_of_a_knob_agree(name: str, mask: str) -> None:
    if mask == "none" and SCHEMES[name].block_order in ("descending", "longest_first"):
        pytest.skip("order_matters: these orders repeat another without a mask")
    (out, lse), (base, base_lse) = _outputs(name, mask), _outputs("base", mask)
    assert (out - base).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * base.abs().max()
    assert (lse - base_lse).abs().max() <= 1e-4


@pytest.mark.parametrize("name", list(SCHEMES))
def test_twenty_runs_are_bitwise_equal(name: str) -> None:
    g = torch.Generator("cuda").manual_seed(3)
    q, k, v = (torch.randn(2, 400, 4, 64, device="cuda", generator=g).bfloat16() for _ in range(3))
    kernel, call = cases.kernel_of(Case(name)), Case(name).call(q, k, v)
    first: tuple[torch.Tensor, torch.Tensor] | None = None
    for _ in range(20):
        out, lse = torch.full_like(q, torch.nan), torch.full((2, 4, 400), torch.nan, device="cuda")
        kernel.launch(call, {"out": out, "lse": lse})
        if first is None:
            first = out, lse
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])


@pytest.mark.parametrize("name", ["base", "kv_outer", "split_k", "overlap", "pairs"])
def test_rows_that_see_nothing(name: str) -> None:
    """More rows than keys: under the bottom-right causal mask the first ones see no key."""
    q = torch.randn(1, 300, 2, 64, device="cuda").bfloat16()
    k, v = (torch.randn(1, 100, 2, 64, device="cuda").bfloat16() for _ in range(2))
    out, lse = torch.full_like(q, torch.nan), torch.full((1, 2, 300), torch.nan, device="cuda")
    cases.kernel_of(Case(name)).launch(Case(name).call(q, k, v), {"out": out, "lse": lse})
    assert (out[:, :200] == 0).all() and (lse[:, :, :200] == -torch.inf).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[:, :, 200:]).all()


def test_long_sequences_are_addressed_in_64_bits() -> None:
    """A batch stride past 2^31 elements."""
    q = torch.empty(3, 1 << 31, dtype=torch.bfloat16, device="cuda")[:, : 64 * 64].view(3, 64, 1, 64)
    q.normal_()
    out, lse = torch.full_like(q, torch.nan), torch.full((3, 1, 64), torch.nan, device="cuda")
    assert q.stride(0) == 1 << 31
    cases.kernel_of(Case("base")).launch(Case("base").call(q, q, q), {"out": out, "lse": lse})
    assert right((out, lse), q, q, q, causal=True)
