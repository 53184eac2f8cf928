"""benchmarks/stalls.py: sizes that are all new, and what it counts."""

from __future__ import annotations

import importlib.util
import json
import random
import types
from pathlib import Path

import pytest

from fagen.build import toolchain

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stalls.py"


@pytest.fixture(scope="module")
def stalls() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("stalls", SCRIPT)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("scenario", ["prompts", "cache", "batches"])
def test_every_size_is_new_and_within_the_bound(stalls: types.ModuleType, scenario: str) -> None:
    some = stalls.sizes(scenario, 300, 8192, random.Random(1))
    assert len(some) == len(set(some)) == 300
    assert max(keys for _, _, keys in some) <= 8192 and min(min(size) for size in some) >= 1
    if scenario == "cache":
        assert [keys for _, _, keys in some] == list(range(7892, 8192)) and {rows for _, rows, _ in some} == {1}
    else:
        assert len({batch for batch, _, _ in some}) == (1 if scenario == "prompts" else 16)


def test_facts_by_hand(stalls: types.ModuleType) -> None:
    seconds = [2.0, *(n / 1000 for n in range(1, 101))]
    assert stalls.facts(seconds) == {
        "calls": 101, "first": 2.0, "median": 0.0505, "p99": 0.1, "worst": 0.1, "over_50_ms": 51,
    }  # fmt: skip
    assert stalls.facts([0.5])["worst"] == 0.5


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_it_runs_on_a_cpu(stalls: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "stalls.json"
    words = "--target cpu --calls 20 --no-first --peers sdpa,fa3 --out"
    stalls.main([*words.split(), str(out)])
    data = json.loads(out.read_text())
    assert data["absent"] == {"fa3": "it needs a GPU"} and data["compiled_after_warmup"] == 0
    assert data["warmup"]["kernels"] >= 1
    for found in data["scenarios"].values():
        assert set(found) == {"fagen", "sdpa"} and found["fagen"]["calls"] == 20
        assert 0 < found["fagen"]["median"] <= found["fagen"]["p99"] <= found["fagen"]["worst"]
    assert "compiled after warm-up: 0" in capsys.readouterr().err
