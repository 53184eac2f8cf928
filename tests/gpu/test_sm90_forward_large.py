"""sm90_forward_large on a Hopper GPU against the oracle: every knob value, ragged sizes, all masks, head dims to 1024,
launches from a graph, dispatch."""

from __future__ import annotations

import itertools

import pytest
import torch

import fagen
from fagen import target
from tests.gpu.test_sm80_forward import EDGES
from tests.support import cases
from tests.support.calls import right
from tests.support.cases import LARGE, SCHEMES_LARGE, Case, run

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (sm_90)"
)

_ROWS = ("large_rows", "large_rows_pair")
_PEERS = ("large_peers", "large_peers_serial")
_WALKS = ("large", "large_pair", "large_four", "large_split", "large_serial", "large_192", *_ROWS, *_PEERS)
_MASKS = {"none": (-1, -1), "causal": (-1, -1), "window": (150, 40)}


_ROOM = {
    "chunk_d": (64,), "stages": (6, 5, 4, 3, 2), "chunks_ahead": (0,), "output_splits": (1, 2), "tile_n": (64,),
    "share_scores": (False,),
}  # fmt: skip


def _case(name: str, head_dim: int, head_dim_v: int = 0, **more) -> Case:
    """The scheme, with as few other values as the head dims ask for."""
    values = ((SCHEMES_LARGE[name][knob], *choices) for knob, choices in _ROOM.items())
    by_changes = sorted(itertools.product(*values), key=lambda v: sum(v[i] != w for i, w in enumerate(_own(name))))
    for chosen in by_changes:
        changes = tuple((k, v) for k, v in zip(_ROOM, chosen, strict=True) if v != SCHEMES_LARGE[name][k])
        case = Case(name, head_dim=head_dim, head_dim_v=head_dim_v, changes=changes, **more)
        if not LARGE.rejects(case.problem, target.known("sm_90"), case.config):
            return case
    raise AssertionError(f"{name} serves no head dims {head_dim}, {head_dim_v}")


def _own(name: str) -> list[object]:
    return [SCHEMES_LARGE[name][knob] for knob in _ROOM]


def _orders(name: str) -> list[str]:
    """Masks that the scheme's order of blocks is for."""
    return [mask for mask in _MASKS if mask != "none" or SCHEMES_LARGE[name].block_order in ("ascending", "sectioned")]


SCHEME_CASES = [
    _case(
        name,
        d,
        256 if name in _ROWS else 0,
        mask=mask,
        window=_MASKS[mask],
        dtype=dtype,
        sizes=(*EDGES, (300, 1500), (1500, 300)),
    )
    for name in SCHEMES_LARGE
    for d, dtype in ((512, "fp16"), (384, "bf16"))[: 2 if name in _WALKS else 1]
    for mask in (_orders(name) if name in _WALKS else ["causal"])
]
DIM_CASES = [
    _case(name, d, dv, mask="causal", heads=4, kv_heads=hk, sizes=((150, 170), (333, 129)))
    for name in ("large", "large_pair", "large_split")
    for (d, dv), hk in zip(
        ((264, 0), (288, 272), (384, 0), (576, 512), (640, 0), (768, 0), (1024, 0), (64, 512), (512, 128), (1024, 8)),
        (1, 2, 4, 1, 2, 4, 1, 2, 4, 1),
        strict=True,
    )
]
DIM_CASES += [
    _case(name, d, dv, mask="causal", heads=4, kv_heads=2, sizes=((150, 170), (333, 129)))
    for name in _ROWS
    for d, dv in ((264, 0), (288, 264), (320, 0), (512, 192))
]
DIM_CASES += [
    _case(name, d, dv, mask="causal", heads=4, kv_heads=2, sizes=((150, 370), (333, 129)))
    for name in _PEERS
    for d, dv in ((264, 0), (384, 0), (576, 512))
]
MASK_CASES = [
    _case(name, 320, mask="intervals", intervals=kind, window=window, sizes=((300, 300), (77, 40), (300, 1500)))
    for name in ("large", "large_pair", "large_four", "large_rows", "large_peers")
    for kind, window in (("lower1", (-1, 0)), ("lower2", (-1, 0)), ("both2", (-1, -1)), ("both4", (100, 30)))
]
SCORE_CASES = [
    _case("large_pair", 512, softcap=10.0, sizes=((130, 190),)),
    _case("large", 512, mask="none", alibi=True, softcap=5.0, sizes=((130, 190),)),
    *(_case("large_pair", 320, magnitude=m, mask="none", sizes=((200, 700),)) for m in (8.0, 30.0, 3e3, 133120.0)),
]
ALL = [*SCHEME_CASES, *DIM_CASES, *MASK_CASES, *SCORE_CASES]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    cases.build_all(list(ALL))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_oracle(case: Case) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = run(case, rows, keys, seed=seed, layout="bhsd" if seed % 2 else "bshd")
        assert verdict, f"{rows}x{keys}: {verdict.message}"
    facts = cases.kernel_of(case).facts
    assert not facts.get("serialized"), "ptxas made the products wait for each other"


@pytest.mark.parametrize("name", _WALKS)
def test_more_tiles_of_rows_than_sms(name: str) -> None:
    verdict = run(_case(name, 320, heads=16, kv_heads=4), 1300, 1300, batch=2)
    assert verdict, verdict.message


@pytest.mark.parametrize("name", _WALKS)
def test_twenty_launches_from_a_graph_are_equal(name: str) -> None:
    g = torch.Generator("cuda").manual_seed(3)
    inputs = [torch.randn(2, 700, 4, 320, device="cuda", generator=g).bfloat16() for _ in range(3)]
    case = _case(name, 320, kv_heads=4)
    kernel, call = cases.kernel_of(case), case.call(*inputs)
    out, lse = torch.full_like(inputs[0], torch.nan), torch.full((2, 4, 700), torch.nan, device="cuda")
    kernel.launch(call, {"out": out, "lse": lse})
    first = out.clone(), lse.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(call, {"out": out, "lse": lse})
    for _ in range(20):
        out.fill_(torch.nan), lse.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, first[0]) and torch.equal(lse, first[1])
    assert right(first, *inputs, causal=True)


def test_no_keys_at_all() -> None:
    q = torch.randn(2, 130, 4, 320, device="cuda").bfloat16()
    k = torch.randn(2, 0, 4, 320, device="cuda").bfloat16()
    out, lse = torch.full_like(q, torch.nan), torch.full((2, 4, 130), torch.nan, device="cuda")
    case = _case("large_pair", 320)
    cases.kernel_of(case).launch(case.call(q, k, k), {"out": out, "lse": lse})
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(320, 320), (512, 512), (576, 512), (1024, 1024)], ids=str)
def test_calls_are_served(dims: tuple[int, int], dtype: torch.dtype) -> None:
    q, k = (torch.randn(2, 300, heads, dims[0], device="cuda").to(dtype) for heads in (4, 2))
    v = torch.randn(2, 300, 2, dims[1], device="cuda").to(dtype)
    verdict = right(fagen.attention(q, k, v, causal=True, return_lse=True), q, k, v, causal=True)
    assert verdict, verdict.message
    assert "picked   sm90_forward_large" in str(fagen.explain(q, k, v, causal=True))


def test_every_scheme_is_run() -> None:
    assert {case.scheme for case in ALL} == set(SCHEMES_LARGE)
