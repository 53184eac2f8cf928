"""sm90_backward_large on a Hopper GPU against gradients by PyTorch: every knob value, ragged sizes, all masks, head
dims to 1024, the same bits in every run, dispatch."""

from __future__ import annotations

import itertools

import pytest
import torch

import fagen
from fagen.codegen.spec import KernelSpec
from fagen.ops.oracle import Verdict
from fagen.runtime import kernel
from fagen.target import known
from tests.support import backward
from tests.support.cases import build_specs, present
from tests.support.large_backward import FAMILY, SCHEMES, Case

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (sm_90)"
)

_BANDS = {"none": (-1, -1), "causal": (-1, -1), "window": (150, 40)}
_KINDS = {"lower1": (-1, 0), "lower2": (-1, 0), "both2": (-1, -1), "both4": (100, 30)}
_SIZES = ((1, 65), (63, 127), (64, 128), (129, 193), (385, 1), (300, 1500), (1500, 300))
_DIMS = ((264, 0), (288, 272), (320, 0), (384, 0), (512, 0), (576, 512), (640, 0), (768, 0), (1024, 0), (64, 512),
         (512, 128), (1024, 8), (128, 1024))  # fmt: skip


def _legal(case: Case) -> bool:
    return FAMILY.rejects(case.problem, known("sm_90"), case.config) is None


def _scheme(name: str, head_dim: int, mask: str, dtype: str) -> Case | None:
    """None where the scheme has no room for the head dim, or an order of blocks for no such mask."""
    window = _BANDS[mask]
    case = Case(name, head_dim=head_dim, mask=mask, window=window, dtype=dtype, heads=4, kv_heads=2, sizes=_SIZES)
    return case if _legal(case) else None


_KINDS_OF_SCHEMES = itertools.product(SCHEMES, ((384, "bf16"), (512, "fp16")), _BANDS)
SCHEME_CASES = [case for name, (d, dtype), mask in _KINDS_OF_SCHEMES if (case := _scheme(name, d, mask, dtype))]
DIM_CASES = [
    Case("default", head_dim=d, head_dim_v=dv, mask=mask, heads=4, kv_heads=kv, sizes=((150, 170), (333, 129)))
    for (d, dv), kv in zip(_DIMS, itertools.cycle((1, 2, 4)), strict=False)
    for mask in ("none", "causal")
]
MASK_CASES = [
    Case(name, head_dim=384, mask="intervals", intervals=kind, window=window, dlse=kind == "both2",
         sizes=((300, 300), (77, 40), (300, 1500)))
    for name in ("default", "pair", "four", "streamed_pair", "peers_streamed")
    for kind, window in _KINDS.items()
]  # fmt: skip
SCORE_CASES = [
    Case("default", head_dim=512, softcap=10.0, dlse=True, sizes=((130, 190),)),
    Case("default", head_dim=512, mask="none", alibi=True, softcap=5.0, sizes=((130, 190),)),
    Case("default", head_dim=320, alibi=True, dtype="fp16", sizes=((130, 190),)),
    Case("peers", head_dim=768, softcap=10.0, alibi=True, dlse=True, sizes=((130, 190), (150, 400))),
    *(Case("default", head_dim=320, magnitude=m, mask="none", sizes=((200, 700),)) for m in (8.0, 30.0)),
]
ALL = [*SCHEME_CASES, *DIM_CASES, *MASK_CASES, *SCORE_CASES]


def _spec(case: Case) -> KernelSpec:
    return KernelSpec(FAMILY, case.problem, present(), FAMILY.require(case.problem, present(), case.config))


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build_specs(map(_spec, ALL))


def check(case: Case, rows: int, keys: int, *, seed: int = 0, batch: int = 2) -> Verdict:
    library, stream = kernel.get(_spec(case)).library, torch.cuda.current_stream().cuda_stream
    layout = "bhsd" if seed % 2 else "bshd"
    return backward.run(case, rows, keys, library, stream, seed=seed, batch=batch, layout=layout, device="cuda")


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_oracle(case: Case) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = check(case, rows, keys, seed=seed)
        assert verdict, f"{rows}x{keys}: {verdict.message}"
    facts = kernel.get(_spec(case)).facts
    assert not facts.get("serialized"), "ptxas made the products wait for each other"


@pytest.mark.parametrize("head_dim", [320, 512, 1024])
def test_more_tiles_than_sms(head_dim: int) -> None:
    verdict = check(Case("default", head_dim=head_dim, heads=16, kv_heads=4), 1300, 1300)
    assert verdict, verdict.message


@pytest.mark.parametrize("name", ["default", "pair", "four", "streamed", "narrow", "peers"])
def test_every_run_gives_the_same_bits(name: str) -> None:
    case = Case(name, head_dim=512, heads=4, kv_heads=2)
    call, library = backward.make_call(case, 700, 700, batch=2, device="cuda"), kernel.get(_spec(case)).library
    stream = torch.cuda.current_stream().cuda_stream
    first = {name: t.clone() for name, t in backward.launch(case, call, library, stream).items()}
    for _ in range(20):
        again = backward.launch(case, call, library, stream)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_no_rows_or_no_keys() -> None:
    case = Case("pair", head_dim=320)
    library, stream = kernel.get(_spec(case)).library, torch.cuda.current_stream().cuda_stream
    for rows, keys in ((0, 130), (130, 0)):
        call = backward.make_call(case, rows, keys, device="cuda")
        assert all((t == 0).all() for t in backward.launch(case, call, library, stream).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(320, 320), (576, 512)], ids=str)
def test_calls_are_served(dims: tuple[int, int], dtype: torch.dtype) -> None:
    q, k = (torch.randn(2, 300, heads, dims[0], device="cuda", dtype=dtype, requires_grad=True) for heads in (4, 2))
    v = torch.randn(2, 300, 2, dims[1], device="cuda", dtype=dtype, requires_grad=True)
    assert "sm90_backward_large" in str(fagen.explain(q, k, v, causal=True))
    fagen.attention(q, k, v, causal=True).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))


def test_every_scheme_is_run() -> None:
    assert {case.scheme for case in ALL} == {*SCHEMES, "default"}
