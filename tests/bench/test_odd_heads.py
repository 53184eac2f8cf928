"""benchmarks/odd_heads.py: its changes of a kernel's text are still possible, and right in the emulator."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import pytest

from fagen import target
from tests.support import emulated
from tests.support.cases import HOPPER, Case, run

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def odd_heads(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("odd_heads")


def test_kernels_to_be_timed(odd_heads) -> None:
    found = odd_heads.variants(target.known("sm_90"))
    assert {one["row"].split()[0] for one in found} == {"d40", "d72", "d88", "d104"}
    assert len({(one["row"], one["source"]) for one in found}) == len(found)
    assert {one["label"] for one in found} >= {"plain", "early", "cluster"}


@pytest.mark.parametrize("variant", ["early", "early, pairs of v", "early, pairs of k, v"])
def test_right_in_the_emulator(odd_heads, cache_folder: Path, variant: str) -> None:
    case = Case("tma", mask="causal", head_dim=72, heads=4, kv_heads=2)
    plain = emulated.source(HOPPER, case.problem, target.known("sm_90"), case.config)
    library = emulated.build(odd_heads.changed(plain, variant), cache_folder / "emulated")
    launch = functools.partial(emulated.launch, library)
    for rows, keys in ((150, 200), (70, 130)):
        verdict = run(case, rows, keys, batch=1, device="cpu", launch=launch)
        assert verdict, verdict.message
