"""sm90_forward on a Hopper GPU against the oracle: knobs alone and in pairs, ragged sizes, all masks, GQA, head dims,
blocks that take many tiles of rows, launches at once, graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fagen import target
from fagen.families import Config
from fagen.ops.attention import masks
from fagen.ops.attention.problem import Problem
from tests.gpu.test_sm80_forward import EDGES
from tests.support import cases
from tests.support.calls import right
from tests.support.cases import HOPPER, SCHEMES_90, Case, run

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (sm_90)"
)


def _tile_edges(config: Config) -> tuple[tuple[int, int], ...]:
    """Rows and keys below, at and above the edges of the config's own tiles, and of the rings that they go round in."""
    m, n, ring = int(config.tile_m), int(config.tile_n), int(config.tile_n * config.stages)
    return (
        (1, n + 1), (m - 1, n - 1), (m, n), (m + 1, n + 1), (2 * m - 1, 2 * n + 1), (2 * m + 1, 2 * n - 1), (m, ring),
        (m + 1, ring + n + 1), (3 * m, ring + 1), (3 * m + 5, 1),
    )  # fmt: skip


def _legal(name: str, mask: str) -> bool:
    return not HOPPER.rejects(Problem(head_dim=64, mask=mask), target.known("sm_90"), SCHEMES_90[name])


def _mask(name: str) -> str:
    """One that the scheme serves."""
    return "causal" if _legal(name, "causal") else "none"


SCHEME_CASES = [
    Case(name, mask=mask, sizes=(*EDGES, *_tile_edges(scheme)))
    for name, scheme in SCHEMES_90.items()
    for mask in ("causal", "none")
    if _legal(name, mask)
]
_MANY = {"causal": ((1300, 1300), (1300, 500), (700, 900)), "none": ((1300, 200),)}
MANY_CASES = [
    Case(name, mask=mask, heads=16, kv_heads=4, sizes=_MANY[mask])
    for name in SCHEMES_90
    for mask in ("causal", "none")
    if _legal(name, mask)
]
DYNAMIC = [name for name, scheme in SCHEMES_90.items() if scheme.schedule == "dynamic"]
_TAKES_TURNS = "tma_dynamic_descending_128x1"  # with two tiles of q
WALKS = (
    "tma", "tma_one_group", "tma_three_groups", "tma_one_stage", "tma_serial", _TAKES_TURNS,
    "tma_dynamic_longest_first_64x3",
)  # fmt: skip
PACKED = ("tma_packed", "tma_dynamic_sectioned_128x1")
WINDOW_CASES = [
    Case(name, mask="window", window=window, sizes=((300, 300), (300, 200), (100, 400), (700, 120)))
    for name in (*WALKS, *PACKED)
    for window in ((50, 20), (10, 0), (70, -1), (-1, 5), (0, 0))
]
WINDOW_CASES += [replace(case, heads=6) for case in WINDOW_CASES if case.scheme in PACKED]
INTERVAL_CASES = [
    Case(name, mask="intervals", intervals=kind, window=window, sizes=((300, 300), (300, 1500), (77, 40), (900, 400)))
    for name in WALKS
    for kind, window in (("lower1", (-1, 0)), ("lower2", (-1, 0)), ("both2", (-1, -1)), ("both4", (100, 30)))
]
_DIMS = (
    (8, 0), (16, 0), (32, 0), (40, 0), (64, 128), (80, 0), (96, 0), (112, 0), (128, 0), (128, 64), (160, 0), (192, 128),
    (192, 0), (224, 0), (256, 0), (256, 64), (72, 0), (88, 0), (104, 0), (120, 0), (72, 40),
)  # fmt: skip
DIM_CASES = [
    Case(name, mask=mask, dtype=dtype, head_dim=d, head_dim_v=dv, heads=4, kv_heads=hk, sizes=((150, 170), (64, 64)))
    for (d, dv), hk in zip(_DIMS, (1, 2, 4) * 7, strict=True)
    for name, mask, dtype in (("tma", "causal", "bf16"), ("tma_turns", "none", "fp16"))
]
DIM_CASES += [
    Case("tma_dynamic", mask="causal", dtype="fp16", head_dim=d, head_dim_v=dv, heads=32, sizes=((700, 700),))
    for d, dv in ((64, 0), (128, 0), (192, 128), (256, 0))
]
GQA_CASES = [
    Case(name, mask="causal", heads=h, kv_heads=hk, sizes=((130, 190), (300, 100)))
    for name in ("tma", "tma_sectioned", "tma_dynamic_sectioned_128x2", "tma_balanced_sectioned_192x1")
    for h, hk in ((8, 8), (8, 1), (6, 3), (12, 4))
]
GQA_CASES += [
    Case(name, mask=mask, heads=h, kv_heads=hk, head_dim=d, sizes=((1, 300), (5, 90), (130, 190), (300, 100)))
    for name, mask in ((PACKED[0], "causal"), (PACKED[1], "causal"), ("tma_balanced_ascending_128x1_pair", "none"))
    for h, hk, d in (
        (4, 4, 64),
        (64, 1, 64),
        (128, 1, 128),
        (12, 2, 128),
        (15, 5, 64),
        (56, 7, 40),
        (28, 4, 128),
        (48, 1, 64),
    )
]
SCORE_CASES = [
    Case("tma", softcap=20.0, mask="none"),
    Case("tma", softcap=5.0, alibi=True),
    Case("tma_three_groups", alibi=True, mask="none"),
    Case("tma", mask="window", window=(60, 10), softcap=10.0),
    Case("tma", mask="intervals", intervals="both4", softcap=10.0),
    Case(_TAKES_TURNS, softcap=10.0, alibi=True, heads=16, kv_heads=16, sizes=((1300, 1300),)),
]
DROPOUT_CASES = [
    Case(name, dropout=0.1, mask=mask, sizes=((300, 330), (70, 300)))
    for name in ("tma", "tma_one_group", "tma_three_groups", "tma_shared_weights", "tma_turns")
    for mask in ("none", "causal")
]
DROPOUT_CASES += [
    Case("tma", mask="intervals", intervals=kind, dropout=0.1, sizes=((300, 330),)) for kind in ("lower1", "both4")
]
SPLIT = ("tma_split", "tma_split_packed", "tma_split_groups")
_FEW = ((1, 5000), (9, 700), (70, 2000), (130, 4100), (300, 900), (700, 5))
SPLIT_CASES = [
    Case(name, mask=mask, window=(700, 30) if mask == "window" else (-1, -1), heads=h, kv_heads=hk, sizes=_FEW)
    for name in SPLIT
    for mask in ("none", "causal", "window")
    for h, hk in ((2, 1), (8, 2), (14, 2))
]
SPLIT_CASES += [
    Case("tma_split", softcap=10.0, alibi=True, sizes=_FEW),
    Case("tma_split", dropout=0.1, sizes=_FEW),
    Case("tma_split", head_dim=192, head_dim_v=128, dtype="fp16", sizes=_FEW),
    Case("tma_split", head_dim=256, mask="none", sizes=_FEW),
    *(Case("tma_split", magnitude=m, sizes=_FEW[1:3]) for m in (30.0, 133120.0)),
]
LARGE_CASES = [
    Case(name, magnitude=m, sizes=((200, 200), (400, 700)))
    for name in ("tma", "tma_rescale_each", "tma_serial", _TAKES_TURNS, "tma_dynamic_sectioned_128x2")
    for m in (8.0, 30.0, 3e3, 133120.0)  # of the last, scores are beyond 2^31
]
ALL = [
    *SCHEME_CASES,
    *WINDOW_CASES,
    *INTERVAL_CASES,
    *DIM_CASES,
    *GQA_CASES,
    *SCORE_CASES,
    *DROPOUT_CASES,
    *SPLIT_CASES,
    *LARGE_CASES,
]


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    cases.build_all([*ALL, Case("base"), Case("base", mask="none")])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_against_the_oracle(case: Case) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = run(case, rows, keys, seed=seed, layout="bhsd" if seed % 2 else "bshd")
        assert verdict, f"{rows}x{keys}: {verdict.message}"
    facts = cases.kernel_of(case).facts
    assert not facts.get("serialized"), "ptxas made the products wait for each other"


@pytest.mark.parametrize("case", MANY_CASES, ids=str)
def test_more_tiles_of_rows_than_blocks(case: Case) -> None:
    """64 heads: a block that stays takes several tiles of rows, of which some see no key where q is longer than k."""
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = run(case, rows, keys, seed=seed, batch=4)
        assert verdict, f"{rows}x{keys}: {verdict.message}"


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        (name, mask)
        for name, scheme in SCHEMES_90.items()
        for mask in ("causal", "none")
        if scheme.block_order == "sectioned" and _legal(name, mask)
    ],
)
def test_sections_of_uneven_sizes(name: str, mask: str) -> None:
    """5 MB of keys and values a head, 7 heads of them: sections of 2, 2, 2, 1, or of 4 and 3, or one of all."""
    verdict = run(Case(name, mask=mask, heads=14, kv_heads=7), 2600, 20000, batch=1)
    assert verdict, verdict.message


# ---- rows that see nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tma", "tma_one_group", "tma_serial", "tma_single", _TAKES_TURNS, *DYNAMIC, *SPLIT])
def test_rows_that_see_nothing(name: str) -> None:
    q = torch.randn(1, 300, 2, 64, device="cuda").bfloat16()
    k, v = (torch.randn(1, 100, 2, 64, device="cuda").bfloat16() for _ in range(2))
    out, lse = _poisoned(q)
    cases.kernel_of(Case(name)).launch(Case(name).call(q, k, v), {"out": out, "lse": lse})
    assert (out[:, :200] == 0).all() and (lse[:, :, :200] == -torch.inf).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[:, :, 200:]).all()


@pytest.mark.parametrize("mask", ["none", "causal", "window", "intervals"])
def test_no_keys_at_all(mask: str) -> None:
    window = (3, 5) if mask in ("window", "intervals") else (-1, -1)
    case = Case("tma_dynamic", mask=mask, window=window, intervals="both4" if mask == "intervals" else "")
    q = torch.randn(2, 130, 4, 64, device="cuda").bfloat16()
    k, v = (torch.randn(2, 0, 4, 64, device="cuda").bfloat16() for _ in range(2))
    intervals = torch.zeros(2, 1, 0, 4, device="cuda", dtype=torch.int32) if mask == "intervals" else None
    out, lse = _poisoned(q)
    cases.kernel_of(case).launch(case.call(q, k, v, intervals=intervals), {"out": out, "lse": lse})
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize(("begin", "end"), [(130, 660), (0, 500), (700, 900), (0, 900)])
@pytest.mark.parametrize("kind", ["lower2", "both4"])
@pytest.mark.parametrize("name", WALKS)
def test_intervals_that_hide_whole_rows(name: str, kind: str, begin: int, end: int) -> None:
    """Rows [begin, end) see nothing, so that tiles of rows without a key lie between others, or all are without one."""
    middle = (begin + end) // 2
    bounds = [begin, end] if kind == "lower2" else [begin, middle, middle, end]
    intervals = torch.tensor(bounds, device="cuda", dtype=torch.int32).expand(4, 4, 900, len(bounds)).contiguous()
    window = (-1, 0) if kind == "lower2" else (100, 30)
    case = Case(name, mask="intervals", intervals=kind, window=window, heads=8, kv_heads=4)
    verdict = run(case, 900, 900, batch=4, intervals=intervals)
    assert verdict, verdict.message


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [(300, 37, 129, 434), (128, 256, 384, 132), (1, 898, 1), (25,) * 36, (450, 450), (700, 1, 199)],
    ids=lambda lengths: "-".join(map(str, lengths[:4])),
)
@pytest.mark.parametrize("name", WALKS)
def test_packed_documents(name: str, lengths: tuple[int, ...], causal: bool) -> None:
    """Tiles of rows end where documents do, as far as there is room for more of them, and other heads differ."""
    bounds = []
    for head in range(4):
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).roll(head))
        bounds.append(masks.from_documents(ids[None], causal=causal)[0, 0])
    intervals = torch.stack(bounds).to("cuda", torch.int32).expand(2, -1, -1, -1).contiguous()
    window = (-1, 0) if causal else (-1, -1)
    kind = "lower1" if causal else "both2"
    case = Case(name, mask="intervals", intervals=kind, window=window, heads=8, kv_heads=4)
    verdict = run(case, 900, 900, intervals=intervals)
    assert verdict, verdict.message


# ---- again and again, at once, from a graph ----------------------------------------------------------------------


def _inputs(seed: int) -> list[torch.Tensor]:
    """64 heads of 700 rows: 256 to 704 tiles of rows, more than blocks can be at work."""
    g = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(4, 700, 16, 64, device="cuda", generator=g).bfloat16() for _ in range(3)]


def _poisoned(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and LSE, bshd, that a kernel must overwrite."""
    return torch.full_like(q, torch.nan), torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan, device="cuda")


def named(outputs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("out", "lse"), outputs, strict=True))


_FEW_ROWS = ((90, 4), (6000, 1), (6000, 1))  # rows and heads of q, k and v


def _launched(name: str, inputs: list[torch.Tensor], mask: str = "causal") -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _poisoned(inputs[0])
    case = Case(name, mask=mask)
    cases.kernel_of(case).launch(case.call(*inputs), {"out": out, "lse": lse})
    return out, lse


@pytest.mark.parametrize("name", list(SCHEMES_90))
def test_twenty_runs_are_equal_and_near_the_other_family(name: str) -> None:
    inputs, mask = _inputs(3), _mask(name)
    out, lse = _launched(name, inputs, mask)
    for _ in range(19):
        again = _launched(name, inputs, mask)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    other, other_lse = _launched("base", inputs, mask)
    assert (out.float() - other.float()).abs().max() <= 2 * torch.finfo(out.dtype).eps * other.abs().max()
    assert (lse - other_lse).abs().max() <= 1e-4


@pytest.mark.parametrize("name", SPLIT)
def test_parts_in_one_workspace(name: str) -> None:
    """Launches in a row, eager and from a graph, whose parts lie in the same memory: no kernel may begin too early."""
    case = Case(name, heads=4, kv_heads=1)
    kernel, made = cases.kernel_of(case), []
    for seed in range(8):
        g = torch.Generator("cuda").manual_seed(seed)
        made.append([torch.randn(1, n, h, 64, device="cuda", generator=g).bfloat16() for n, h in _FEW_ROWS])
    workspace, many = torch.empty(1 << 26, dtype=torch.uint8, device="cuda"), [_poisoned(x[0]) for x in made]
    calls = [case.call(*x) for x in made]

    def launch_all() -> None:
        for call, outputs in zip(calls, many, strict=True):
            kernel.launch(call, named(outputs), workspace=workspace)

    graph = torch.cuda.CUDAGraph()
    launch_all()
    torch.cuda.synchronize()
    eager = [tuple(t.clone() for t in outputs) for outputs in many]
    with torch.cuda.graph(graph):
        launch_all()
    for outputs in many:
        for tensor in outputs:
            tensor.fill_(torch.nan)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for x, before, outputs in zip(made, eager, many, strict=True):
        assert torch.equal(before[0], outputs[0]) and torch.equal(before[1], outputs[1])
        assert right(outputs, *x, causal=True)


@pytest.mark.parametrize("name", [*DYNAMIC, "tma"])
def test_launches_on_two_streams_at_once(name: str) -> None:
    """Each launch has a counter of its own, and its forward kernel may start before that is set to zero."""
    kernel = cases.kernel_of(Case(name))
    inputs = [_inputs(seed) for seed in (11, 12)]
    alone = [_launched(name, x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    outputs = [[_poisoned(x[0]) for _ in range(10)] for x in inputs]
    calls = [
        [kernel.bind(Case(name).call(*x), named(output), stream=stream.cuda_stream) for output in many]
        for x, many, stream in zip(inputs, outputs, streams, strict=True)
    ]
    torch.cuda.synchronize()
    for pair in zip(*calls, strict=True):
        for call in pair:
            call()
    torch.cuda.synchronize()
    for (out, lse), many, x in zip(alone, outputs, inputs, strict=True):
        assert all(torch.equal(out, o) and torch.equal(lse, e) for o, e in many)
        assert right((out, lse), *x, causal=True)


@pytest.mark.parametrize("name", [*DYNAMIC, "tma", "tma_single"])
def test_a_graph_replays(name: str) -> None:
    """Two launches in a row are captured; each replay sees new inputs in the same place."""
    kernel, inputs = cases.kernel_of(Case(name)), _inputs(21)
    first, second = _poisoned(inputs[0]), _poisoned(inputs[0])
    call = Case(name).call(*inputs)
    kernel.launch(call, named(first))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(call, named(first))
        kernel.launch(call, named(second))
    for seed in range(22, 27):
        for tensor, new in zip(inputs, _inputs(seed), strict=True):
            tensor.copy_(new)
        for tensor in (*first, *second):
            tensor.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        out, lse = _launched(name, inputs)
        for o, e in (first, second):
            assert torch.equal(out, o) and torch.equal(lse, e)
    assert right((out, lse), *inputs, causal=True)
