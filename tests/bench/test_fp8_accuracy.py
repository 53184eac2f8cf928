"""benchmarks/fp8_accuracy.py at small sizes: what each measure saves, and that its emulation is the kernel's."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fp8_accuracy.py"
BASE = "fp8, one scale a tensor, no measure"
SMALL = ["--draws=1", "--heads=2", "--rows=32", "--short=1024", "--keys=32768", "--head-dim=64"]


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("fp8_accuracy", SCRIPT)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    sys.modules["fp8_accuracy"] = made
    spec.loader.exec_module(made)
    return made


def test_what_each_measure_saves(script: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [title.split(",")[0] for title in found] == ["gaussian", "outliers", "needle"]
    for kind in found.values():
        rmse = {method.strip(): error["rmse"] for method, error in kind.items()}
        assert rmse["bf16"] < 0.5 * rmse["fagen fp8"]
        assert rmse["fagen fp8"] < 1.05 * rmse[BASE]
        assert all(error["rmse"] <= error["largest"] for error in kind.values())
    outliers, needle = ({m.strip(): e["rmse"] for m, e in found[title].items()} for title in list(found)[1:])
    assert outliers["fagen fp8"] < 0.8 * outliers["without incoherent processing"]
    assert needle["fagen fp8"] < 0.95 * needle["promote=0"]
    assert needle["fagen fp8"] < 0.8 * needle["without scaling the weights"]


def test_the_table(script: types.ModuleType) -> None:
    errors = {"rmse": 1e-3, "largest": 2e-3}
    text = script.table("some", {BASE: {"rmse": 2e-3, "largest": 1e-2}, "  x": errors})
    assert text.splitlines()[-1] == "| &nbsp;&nbsp;x | 1.00e-03 | 2.00e-03 | 2.00 |"


def test_sums_are_cut_as_the_tensor_cores_cut_them(script: types.ModuleType) -> None:
    one, small = torch.ones(1, 32), torch.full((32, 1), 2.0**-19)
    assert float(script.multiply(one, small, torch.ones(1, 1))) == 1.0  # 2^-14 is lost
    assert float(script.multiply(one, 2 * small, torch.ones(1, 1))) == 1.0 + 2**-13
    assert float(script.cut(torch.tensor(-1.0 - 2**-14))) == -1.0
