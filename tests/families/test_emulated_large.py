"""sm90_forward_large on the CPU (tests/emulator): right by the oracle, whatever comes first."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall
from fagen.target import known
from tests.support import emulated
from tests.support.cases import LARGE, SCHEMES_LARGE, Case, run
from tests.support.thorough import sample

# rows and keys: a ragged end of both, rows that see no key, fewer rows than a cluster has
CASES = {
    Case("large", mask="causal", head_dim=320, heads=2, kv_heads=1): ((100, 150), (130, 70)),
    Case("large_rows", mask="causal", head_dim=320, heads=2, kv_heads=1): ((200, 260), (130, 70)),
    Case("large_rows_pair", mask="window", window=(90, 30), head_dim=384, head_dim_v=200, heads=2): ((300, 350),),
    Case("large_peers", mask="causal", head_dim=384, heads=2, kv_heads=1): ((200, 400), (130, 70)),
    Case("large_peers_serial", mask="intervals", intervals="both4", head_dim=288, head_dim_v=264, heads=2): (
        (200, 330),
    ),
    Case("large_peers", mask="window", window=(200, 50), head_dim=512, dtype="fp16", heads=1, kv_heads=1): (
        (150, 520),
    ),
    Case("large_rows", mask="intervals", intervals="both2", head_dim=288, dtype="fp16", heads=2): ((200, 230),),
    Case("large_pair", mask="none", head_dim=288, head_dim_v=264, dtype="fp16", heads=2): ((70, 300), (150, 90)),
    Case("large_split", mask="window", window=(70, 20), head_dim=264, head_dim_v=520, heads=2, kv_heads=1): (
        (150, 200),
    ),
    Case("large_four", mask="intervals", intervals="both4", head_dim=256, head_dim_v=320, heads=2): ((200, 230),),
    Case("large_serial", mask="causal", head_dim=512, softcap=15.0, heads=2, kv_heads=1): ((90, 200),),
    Case("large_192", mask="causal", head_dim=272, head_dim_v=64, alibi=True, heads=2, kv_heads=1): ((100, 400),),
    Case("large_pair", mask="intervals", intervals="lower1", window=(-1, 0), head_dim=320, heads=2): ((150, 300),),
    Case("large", mask="none", head_dim=576, head_dim_v=512, heads=2, kv_heads=1): ((70, 130),),
    Case("large", mask="causal", head_dim=640, heads=1, kv_heads=1): ((70, 130),),
    Case(
        "large_split", mask="causal", head_dim=1024, heads=1, kv_heads=1, changes=(("stages", 5), ("chunks_ahead", 2))
    ): ((70, 130),),
}


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    """Each test compiles the kernel that it runs, unless some test has."""
    return cache_folder / "emulated"


@functools.cache
def _source(case: Case) -> str:
    return emulated.source(LARGE, case.problem, known("sm_90"), case.config)


def check(case: Case, folder: Path, rows: int, keys: int, *, seed: int = 0, text: str = "") -> reference.Verdict:
    library = emulated.build(text or _source(case), folder)
    launch = functools.partial(emulated.launch, library, seed=seed)
    return run(case, rows, keys, seed=seed, batch=1, device="cpu", launch=launch)


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(list(CASES), every=3), ids=str)
def test_right_whatever_comes_first(case: Case, folder: Path) -> None:
    for seed, (rows, keys) in enumerate(CASES[case]):
        verdict = check(case, folder, rows, keys, seed=seed)
        assert verdict, f"{rows}x{keys}: {verdict.message}"


FIRST = next(iter(CASES))

_PUBLISH = "    ptx::fence_shared_writes();\n    wait_for_all();\n"
_WAIT_FREE = "    ptx::wgmma_wait<kNewest>();\n    for (; chunks_held > kNewest; --chunks_held) held.release();\n"
_FREE_WAIT = "    for (; chunks_held > kNewest; --chunks_held) held.release();\n    ptx::wgmma_wait<kNewest>();\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (_PUBLISH, ""),  # a warpgroup multiplies weights that the other has not stored
        ("      wait_for_all();\n    }\n#pragma", "    }\n#pragma"),  # or reads maxima that are not there
        ("    ring.wait();\n", ""),  # chunks are read before they are there
        ("      ring.acquire();\n", ""),  # or overwritten while they are read
        (_WAIT_FREE, _FREE_WAIT),  # or freed before
    ],
)
def test_who_does_not_wait_is_wrong(old: str, new: str, folder: Path) -> None:
    text = _source(FIRST)
    assert old in text
    text = text.replace(old, new)
    assert any(_is_wrong(text, folder, seed) for seed in range(12))


PEERS = next(case for case in CASES if case.scheme == "large_peers")


@pytest.mark.slow
@pytest.mark.parametrize(
    "wait",
    [
        "      peer.wait_for_numbers();\n",  # a reference is kept that the peer does not have
        "      if (L::kPeers && chunk == L::kValueChunks / 2) peer.wait_for_weights();\n",
    ],
)
def test_peers_that_do_not_wait_are_wrong(wait: str, folder: Path) -> None:
    text = _source(PEERS)
    assert wait in text
    text = text.replace(wait, "")
    assert any(_is_wrong(text, folder, seed, PEERS) for seed in range(12))


def _is_wrong(text: str, folder: Path, seed: int, case: Case = FIRST) -> bool:
    try:
        return not check(case, folder, 100, 400, seed=seed, text=text)
    except AssertionError:  # nothing can go on
        return True


def test_calls_without_keys_give_zeros(folder: Path) -> None:
    q, k = torch.randn(1, 70, 2, 320, dtype=torch.bfloat16), torch.empty(1, 0, 1, 320, dtype=torch.bfloat16)
    out, lse = torch.full_like(q, torch.nan), torch.full((1, 2, 70), torch.nan)
    call = AttentionCall.of(q, k, k, causal=True)
    emulated.launch(emulated.build(_source(FIRST), folder), call, {"out": out, "lse": lse})
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_every_value_of_every_knob_is_run() -> None:
    for knob in LARGE.knobs:
        assert {scheme[knob.name] for scheme in SCHEMES_LARGE.values()} == set(knob.choices), knob.name
