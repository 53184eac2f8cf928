"""sm90_forward_fp8 on a Hopper GPU against the op's own check: knobs, ragged sizes, masks, GQA, head dims, descales of
heads and of blocks, thread blocks that take many tiles of rows, launches again and again and from a graph,
`fagen.attention` and `fagen.quantize_qkv` themselves."""

from __future__ import annotations

import pytest
import torch

import fagen
from fagen import target
from fagen.codegen.spec import KernelSpec
from fagen.dispatch import fp8
from fagen.ops.attention import fp8_quantize
from fagen.ops.attention.fp8_call import Fp8Call
from fagen.ops.attention.fp8_calls import check
from fagen.runtime import kernel, quantize
from fagen.runtime.kernel import Kernel
from tests.gpu.test_sm80_forward import EDGES
from tests.support import cases
from tests.support.fp8 import FAMILY, SCHEMES, Case, huge_scores, judged, make_call, run

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (sm_90)"
)
HOPPER = target.known("sm_90")


def _masks(name: str) -> list[str]:
    return [m for m in ("causal", "none") if not FAMILY.rejects(Case(name, mask=m).problem, HOPPER, SCHEMES[name])]


SCHEME_CASES = [Case(name, mask=mask) for name in SCHEMES for mask in _masks(name)]
SOME = ("base", "turns", "every_tile", "two_tiles", "serial")
WINDOW_CASES = [
    Case(name, mask="window", window=window)
    for name in SOME
    for window in ((50, 20), (10, 0), (70, -1), (-1, 5), (0, 0))
]
_SMALL = (("tile_n", 64), ("q_stages", 1))
DIM_CASES = [
    Case(name, mask=mask, dtype=dtype, head_dim=d, head_dim_v=dv, kv_heads=kv_heads, changes=_SMALL)
    for (d, dv), kv_heads in zip(
        ((16, 0), (32, 0), (48, 0), (80, 0), (96, 0), (112, 0), (128, 0), (128, 64), (160, 0), (192, 128), (192, 0),
         (224, 0), (256, 0), (256, 64)), (1, 2, 4) * 5, strict=False,
    )
    for name, mask, dtype in (("base", "causal", "bf16"), ("each", "none", "fp16"))
]  # fmt: skip
BLOCK_CASES = [
    *(Case(name, mask=mask, block=192) for name in ("base", "turns", "every_tile", "two_tiles", "serial", "deep")
      for mask in ("none", "causal")),
    Case("each", block=128, softcap=5.0, dtype="fp16"),
    Case("base", mask="window", window=(70, 20), block=64, head_dim=128),
    Case("turns", mask="intervals", intervals="both4", block=64),
    Case("every_tile", mask="intervals", intervals="lower1", block=192),
]  # fmt: skip
INTERVAL_CASES = [
    *(Case(name, mask="intervals", intervals=kind)
      for name, kind in zip(SOME, ("lower1", "lower2", "both2", "both4", "lower1"), strict=True)),
    Case("base", mask="intervals", intervals="lower1", window=(150, 0), head_dim=128),
    Case("sections", mask="intervals", intervals="both2"),
    Case("deep", mask="intervals", intervals="both2", head_dim=96, softcap=5.0),
    Case("each", mask="intervals", intervals="lower2", head_dim=256, changes=(*_SMALL,)),
]  # fmt: skip
OTHER_CASES = [
    Case("base", softcap=10.0),
    Case("two_tiles", softcap=5.0, mask="none"),
    Case("turns", descales=False),
    Case("every_tile", magnitude=3.0),  # of larger ones the tensor cores' sums may take another key for the largest
    *(Case("turns", heads=h, kv_heads=hk) for h, hk in ((8, 8), (8, 1), (6, 3))),
]
ALL = [*SCHEME_CASES, *WINDOW_CASES, *DIM_CASES, *BLOCK_CASES, *INTERVAL_CASES, *OTHER_CASES]
DEFAULTS = [Case("base", mask=mask, head_dim=d) for d in (64, 128, 256) for mask in ("none", "causal")]


def kernel_of(case: Case) -> Kernel:
    FAMILY.require(case.problem, cases.present(), case.config)
    return kernel.get(KernelSpec(FAMILY, case.problem, cases.present(), case.config))


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    cases.build_specs(KernelSpec(FAMILY, case.problem, cases.present(), case.config) for case in ALL)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_oracle(case: Case) -> None:
    n = int(case.config.tile_n)
    made = kernel_of(case)
    for seed, (rows, keys) in enumerate((*EDGES, (int(case.config.tile_m) + 1, 3 * n + 1), (700, 900))):
        verdict = run(case, rows, keys, made.launch, seed=seed, layout="bhsd" if seed % 2 else "bshd")
        assert verdict, f"{rows}x{keys}: {verdict.message}"
    assert not made.facts.get("serialized"), "ptxas made the products wait for each other"


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_defaults_at_their_sizes(case: Case) -> None:
    problem = case.problem.replace(batch=4, heads=16, seqlen_q=2048, seqlen_k=2048)
    config = FAMILY.default(problem, cases.present())
    made = kernel.get(KernelSpec(FAMILY, problem, cases.present(), config))
    call = make_call(Case("base", mask=case.mask, head_dim=case.head_dim, heads=16, kv_heads=16), 2048, 2048, 1,
                     batch=4, device="cuda", layout="bshd")  # fmt: skip
    outputs = {n: torch.full(s, torch.nan, dtype=t, device="cuda") for n, (s, t) in call.output_types().items()}
    made.launch(call, outputs)
    verdict = check(call, outputs)
    assert verdict, f"{config}: {verdict.message}"


@pytest.mark.parametrize("name", list(SCHEMES))
def test_more_tiles_of_rows_than_blocks(name: str) -> None:
    """64 heads: a block that stays takes several tiles of rows, of which some see no key where q is longer than k."""
    for mask in _masks(name):
        case = Case(name, mask=mask, heads=16, kv_heads=4)
        verdict = run(case, 1300, 500, kernel_of(case).launch, batch=4)
        assert verdict, verdict.message


@pytest.mark.parametrize("name", list(SCHEMES))
def test_many_runs_and_a_graph_are_equal(name: str) -> None:
    case = Case(name, mask=_masks(name)[0], heads=16, kv_heads=16)
    made = kernel_of(case)
    call = make_call(case, 700, 700, 3, batch=4, device="cuda", layout="bshd")
    outputs = {n: torch.full(s, torch.nan, dtype=t, device="cuda") for n, (s, t) in call.output_types().items()}
    launch = made.bind(call, outputs)
    launch()
    first = {n: t.clone() for n, t in outputs.items()}
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        made.launch(call, outputs)
    for repeat in range(20):
        for t in outputs.values():
            t.fill_(torch.nan)
        graph.replay() if repeat % 2 else launch()
        torch.cuda.synchronize()
        assert all(torch.equal(t, first[n]) for n, t in outputs.items())


@pytest.mark.parametrize("case", [Case("base", mask="none"), Case("base", mask="none", block=192)], ids=str)
def test_the_largest_weight_is_one_however_large_the_scores(case: Case) -> None:
    for top in (3, 99, 169):
        verdict = judged(huge_scores(case, 70, 170, top, device="cuda"), kernel_of(case).launch)
        assert verdict, verdict.message


def test_no_keys_at_all() -> None:
    case = Case("turns")
    call = make_call(case, 130, 1, 0, batch=2, device="cuda", layout="bshd")
    empty = Fp8Call(call.q, call.k[:, :0], call.v[:, :, :0], window=(-1, 0))
    outputs = {n: torch.full(s, torch.nan, dtype=t, device="cuda") for n, (s, t) in empty.output_types().items()}
    kernel_of(case).launch(empty, outputs)
    assert (outputs["out"] == 0).all() and (outputs["lse"] == -torch.inf).all()


def test_promotion_keeps_what_the_tensor_cores_lose() -> None:
    """Values that are all alike, many keys: whatever is lost shows."""
    lost = {}
    for promote in (0, 1):
        case = Case("base", mask="none", dtype="fp16", heads=1, kv_heads=1, changes=(("promote", promote),))
        call = make_call(case, 64, 65536, 0, batch=1, device="cuda", layout="bshd")
        call.v.fill_(448.0)
        outputs = {n: torch.empty(s, dtype=t, device="cuda") for n, (s, t) in call.output_types().items()}
        kernel_of(case).launch(call, outputs)
        want = call.dequantized().v[0, 0, 0, 0]
        lost[promote] = float((outputs["out"].float() - want).abs().max() / want)
    assert lost[1] < 0.005, lost
    assert lost[1] <= lost[0], lost


@pytest.mark.parametrize("block", [0, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_of_quantised_tensors(head_dim: int, block: int) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, n, h, head_dim, device="cuda", generator=g).bfloat16() for n, h in ((500, 8), (700, 2), (700, 2))
    )
    x = fagen.quantize_qkv(q, k, v, block=block)
    descales = {"descale_q": x.descale_q, "descale_k": x.descale_k, "descale_v": x.descale_v}
    call = Fp8Call.of(*x[:3], descales=tuple(descales.values()), block=block, causal=True)
    assert fp8.kernel_of(call) is not None
    out, lse = fagen.attention(x.q, x.k, x.v, **descales, descale_block=block, causal=True, return_lse=True)
    verdict = check(call, {"out": out, "lse": lse})
    assert verdict, verdict.message
    want = fagen.attention(q, k, v, causal=True).float()
    assert (out.float() - want).square().mean().sqrt() < 0.08 * want.square().mean().sqrt()


@pytest.mark.parametrize(
    ("d", "dv", "layout", "block", "turned"),
    [
        (64, 64, "bshd", 0, None),
        (128, 128, "bhsd", 128, None),
        (256, 256, "bshd", 64, 128),
        (96, 48, "bshd", 0, 32),
        (128, 128, "bhsd", 0, 128),
    ],
)
@pytest.mark.parametrize("incoherent", [False, True])
def test_numbers_are_made_as_by_pytorch(
    d: int, dv: int, layout: str, incoherent: bool, block: int, turned: int | None
) -> None:
    g = torch.Generator("cuda").manual_seed(d)
    shapes = ((2, 777, 4, d), (2, 1111, 2, d), (2, 1111, 2, dv))
    tensors = [torch.randn(shape, generator=g, device="cuda").bfloat16() for shape in shapes]
    tensors = [t if layout == "bshd" else t.transpose(1, 2) for t in tensors]
    rotary = None
    if turned is not None:
        angles = 6 * torch.rand(1111, turned // 2, generator=g, device="cuda")
        rotary = fp8_quantize.Rotary(angles.cos(), angles.sin(), incoherent)
    assert quantize.HELPER.library(cases.present(), False) is not None
    mine = fp8.quantize(*tensors, layout, incoherent, block, rotary)
    want = fp8_quantize.by_torch(*tensors, layout, incoherent, block, rotary)
    for name in ("descale_q", "descale_k", "descale_v"):
        torch.testing.assert_close(getattr(mine, name), getattr(want, name), rtol=1e-4, atol=0)
    for name in ("q", "k", "v"):
        a, b = (getattr(x, name).float() for x in (mine, want))
        off = (a - b).abs()
        assert a.shape == b.shape and (off <= (a.abs() / 8).clamp(min=2.0**-9)).all(), name
        assert (off > 0).float().mean() < 0.02, name
