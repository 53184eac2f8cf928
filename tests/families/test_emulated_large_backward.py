"""sm90_backward_large on the CPU (tests/emulator): right gradients, whatever comes first."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from fagen.ops.attention.params import BackwardParams
from fagen.ops.oracle import Verdict
from fagen.target import known
from tests.support import backward, emulated
from tests.support.large_backward import FAMILY, SCHEMES, Case
from tests.support.thorough import sample


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    return cache_folder / "emulated"


@functools.cache
def _source(case: Case) -> str:
    config = FAMILY.require(case.problem, known("sm_90"), case.config)
    return emulated.source(FAMILY, case.problem, known("sm_90"), config)


def check(
    case: Case, folder: Path, rows: int, keys: int, *, seed: int = 0, chance: int = 0, text: str = "", **more: Any
) -> Verdict:
    library = emulated.build(text or _source(case), folder, BackwardParams)
    library._library.emulator_begin(ctypes.c_uint64(seed + chance), ctypes.c_int(3))
    return backward.run(case, rows, keys, library, seed=seed, **more)


_SIZES = ((100, 150), (150, 70))
_BAND = (-1, 0)
CASES = [
    Case("base", mask="none", head_dim=512, sizes=_SIZES),
    Case("pair", mask="causal", head_dim=320, heads=4, kv_heads=2, dlse=True, sizes=((150, 330), (200, 130))),
    Case(
        "four", mask="intervals", intervals="both4", window=(100, 30), head_dim=288, head_dim_v=264, sizes=((300, 200),)
    ),
    Case("streamed", mask="window", window=(70, 20), dtype="fp16", head_dim=512, heads=1, sizes=((150, 200),)),
    Case("streamed_pair", mask="intervals", intervals="lower1", window=_BAND, head_dim=384, sizes=((200, 260),)),
    Case("narrow", mask="causal", head_dim=264, head_dim_v=520, softcap=15.0, dlse=True, sizes=((100, 130),)),
    Case("narrow_pair", mask="window", window=(30, -1), head_dim=576, head_dim_v=512, sizes=((130, 150),)),
    Case("wide", mask="causal", head_dim=640, heads=1, dtype="fp16", sizes=((70, 130),)),
    Case("long_tiles", mask="intervals", intervals="both2", head_dim=272, head_dim_v=64, sizes=((230, 300),)),
    Case("long_tiles", mask="causal", head_dim=64, head_dim_v=512, alibi=True, sizes=((100, 400),)),
    Case("streamed", mask="causal", head_dim=512, softcap=5.0, alibi=True, dtype="fp16", sizes=((70, 130),)),
    Case("pair", mask="intervals", intervals="lower2", window=_BAND, head_dim=264, dtype="fp16", sizes=((90, 300),)),
    Case(
        "narrow", mask="none", head_dim=1024, head_dim_v=8, heads=3, changes=(("chunks_under", 1),), sizes=((65, 129),)
    ),
    Case("streamed_pair", mask="causal", head_dim=1024, heads=1, sizes=((70, 130),)),
    *(Case(f"stages{n}", mask="causal", head_dim=264, sizes=((100, 150),)) for n in (7, 8, 10, 12)),
    Case("peers", mask="causal", head_dim=520, dlse=True, sizes=((100, 300), (150, 70))),
    Case("peers_streamed", mask="intervals", intervals="both4", head_dim=320, head_dim_v=384, sizes=((300, 200),)),
    Case("peers_streamed", mask="window", window=(90, 40), head_dim=512, dtype="fp16", heads=1, sizes=((130, 600),)),
    Case("peers", mask="none", head_dim=768, head_dim_v=64, changes=(("chunks_under", 1),), sizes=((70, 300),)),
    Case("default", mask="causal", head_dim=512, heads=4, kv_heads=2, sizes=_SIZES),
    Case("default", mask="none", head_dim=768, heads=2, kv_heads=1, dlse=True, sizes=((70, 330),)),
    Case("default", mask="none", head_dim=896, heads=1, sizes=((130, 40),)),
    Case("default", mask="window", window=(90, 40), head_dim=1024, heads=1, dtype="fp16", sizes=((100, 150),)),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(CASES, every=5), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(case.sizes):
        verdict = check(case, folder, rows, keys, seed=seed, layout=("bshd", "bhsd")[seed % 2], batch=1 + seed)
        assert verdict, f"{rows}x{keys}: {verdict.message}"


EDGES = Case("pair", mask="causal", head_dim=264)


@pytest.mark.slow
def test_right_at_the_edges_of_tiles(folder: Path) -> None:
    for seed, (rows, keys) in enumerate(((1, 65), (63, 129), (128, 64), (129, 1))):
        verdict = check(EDGES, folder, rows, keys, seed=seed)
        assert verdict, f"{rows}x{keys}: {verdict.message}"


def test_rows_and_keys_that_see_nothing(folder: Path) -> None:
    """Their gradients are 0, whatever that of their logsumexp is."""
    case = Case("pair", mask="causal", head_dim=264, dlse=True)
    for rows, keys in ((200, 1), (1, 200), (200, 70)):
        verdict = check(case, folder, rows, keys)
        assert verdict, verdict.message
    for rows, keys in ((0, 70), (70, 0)):
        call = backward.make_call(case, rows, keys)
        outputs = backward.launch(case, call, emulated.build(_source(case), folder, BackwardParams))
        assert all((t == 0).all() for t in outputs.values())


def test_large_scores_stay_finite(folder: Path) -> None:
    verdict = check(Case("base", mask="none", magnitude=30.0), folder, 70, 70)
    assert verdict, verdict.message


@pytest.mark.parametrize("case", sample([EDGES, CASES[2]], every=2), ids=str)
def test_the_order_of_blocks_changes_no_bit(case: Case, folder: Path) -> None:
    call = backward.make_call(case, 70, 150)
    library = emulated.build(_source(case), folder, BackwardParams)
    runs = []
    for chance in range(2):
        library._library.emulator_begin(ctypes.c_uint64(chance), ctypes.c_int(2 + chance))
        runs.append({name: t.clone() for name, t in backward.launch(case, call, library).items()})
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


_WAIT_FREE = "    ptx::wgmma_wait<kNewest>();\n    for (; chunks_held > kNewest; --chunks_held) oldest().release();\n"
_FREE_WAIT = "    for (; chunks_held > kNewest; --chunks_held) oldest().release();\n    ptx::wgmma_wait<kNewest>();\n"
_BREAKS = {
    "cells are read before both have stored theirs": (
        "    ptx::fence_shared_writes();\n    ptx::barrier_sync(kBarrier, L::kConsumers);\n",
        "",
    ),
    "chunks are read before they are there": ("    pipelines.chunks.wait();\n", ""),
    "chunks are overwritten while they are read": ("      pipelines.chunks.acquire();\n", ""),
    "chunks are freed before they are read": (_WAIT_FREE, _FREE_WAIT),
    "what stays is read before it is there": ("pipelines.own.wait();", ";"),
    "stats are read before they are there": ("    pipelines.stats.wait();\n", ""),
    "no mask": ("    if (walk.partial())\n      cells", "    if (false)\n      cells"),
    "no delta": ("dp[j][i] - stats.delta(i)", "dp[j][i]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sample(list(_BREAKS), every=4))
def test_what_is_left_out_is_found(name: str, folder: Path) -> None:
    case, (old, new) = Case("base", mask="causal", head_dim=264, heads=1, dlse=True), _BREAKS[name]
    text = _source(case)
    assert old in text
    assert any(_is_wrong(case, folder, seed, text.replace(old, new)) for seed in range(12))


@pytest.mark.slow
def test_cells_wait_for_who_lags_behind(folder: Path) -> None:
    """Where there are more stages than chunks until the next cells: elsewhere nobody is so far ahead."""
    wait = "    if constexpr (L::kMayOvertake) ptx::barrier_sync(kBarrier + 1, L::kConsumers);"
    short = Case("base", mask="none", head_dim=64, head_dim_v=264, heads=1, changes=(("stages", 8),))
    text = _source(short)
    assert wait in text
    assert any(_is_wrong(short, folder, seed, text.replace(wait, "")) for seed in range(40))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wait",
    sample(
        [
            "      if (L::kPeers && chunk == L::kSumChunks / 2) pipelines.cells.wait();\n",
            "    if constexpr (L::kPeers) pipelines.cells.acquire();",
        ],
        every=2,
    ),
)
def test_peers_that_do_not_wait_are_wrong(wait: str, folder: Path) -> None:
    peers = Case("peers", mask="none", head_dim=264, heads=1, changes=(("block_columns", 256),))
    text = _source(peers)
    assert wait in text
    assert any(_is_wrong(peers, folder, seed, text.replace(wait, "")) for seed in range(40))


def _is_wrong(case: Case, folder: Path, seed: int, text: str) -> bool:
    try:
        return not check(case, folder, 100, 300, seed=seed, text=text)
    except AssertionError:  # nothing can go on
        return True


def test_every_value_of_every_knob_is_run() -> None:
    for knob in FAMILY.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES.values()} == set(knob.choices), knob.name
    assert {case.scheme for case in CASES} >= set(SCHEMES)
