"""benchmarks/carry_hashes.py: a hash moves only where the machine code is the same, and where it was the tuned one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fagen.db.merge import put
from fagen.db.record import Record
from fagen.db.store import Database
from fagen.families import get
from fagen.ops.attention.problem import Problem
from fagen.target import known

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "carry_hashes.py"
FAMILY, GPU = get("sm90_forward"), known("sm_90")
HASHES = {64: "0aaa", 128: "0bbb", 256: "0ccc"}  # of the tuned sources, by head dim
LABELS = {64: "the same code", 128: "other code", 256: "tuned before that"}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("carry_hashes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["carry_hashes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    records = []
    for head_dim, hash_ in HASHES.items():
        problem = Problem(head_dim=head_dim)
        config = dict(FAMILY.default(problem, GPU))
        records.append(Record(problem, "sm_90", "NVIDIA H100", FAMILY.name, config, 1e-3, 1e-6, 2e-3, 0.0, hash_))
    put(records, tmp_path / "tuning_db")
    (tmp_path / "generated").mkdir()
    note = {"family": FAMILY.name, "arch": "sm_90", "problem": Problem(head_dim=64).to_dict(), "verified": None}
    verified = {**note, "config": records[0].config, "verified": {"source_hash": "0aaa"}, "source_hash": "0add"}
    manifest = {"kernels": {"never": note, "one": verified}}
    (tmp_path / "generated" / "manifest.json").write_text(json.dumps(manifest))
    return module


def test_a_hash_is_carried_where_the_code_is_the_same(script, tmp_path, monkeypatch, capsys):
    def rendered(tree: Path, wanted: dict) -> dict:
        today = tree == tmp_path
        told = {}
        for name, one in wanted.items():
            d = one["problem"]["head_dim"]
            was = "0fff" if d == 256 else HASHES[d]
            told[name] = {"hash": f"0ad{d:03}" if today else was, "flags": [], "source": f"{d} {today}"}
        return told

    real = script._disassembly()

    def measure(source: str, *_: object) -> list:
        head_dim, today = source.split()
        changed = head_dim == "128" and today == "True"
        return [real.summary("forward_kernel", [("ADD R1, R2", "0x1"), ("EXIT", "0x3" if changed else "0x2")])]

    monkeypatch.setattr(script, "rendered", rendered)
    monkeypatch.setattr(script, "_disassembly", lambda: real)
    monkeypatch.setattr(real, "measure", measure)
    assert script.main(["--tree", str(tmp_path / "other"), "--nvcc", "nvcc", "--nvdisasm", "nvdisasm"]) == 0
    found = {r.problem.head_dim: r.source_hash for r in Database.load([tmp_path / "tuning_db"]).records}
    assert found == {64: "0ad064", 128: "0bbb", 256: "0ccc"}, LABELS
    kernels = json.loads((tmp_path / "generated" / "manifest.json").read_text())["kernels"]
    assert kernels["one"]["verified"]["source_hash"] == "0ad064" and kernels["never"]["verified"] is None
    assert "2 of 4 carried over; 1 kernels differ" in capsys.readouterr().out


def test_todays_templates_are_rendered(script, tmp_path):
    """By the process that `rendered` starts, in this checkout."""
    wanted = {name: one for name, one in script.asked().items() if "d64" in name}
    (told,) = script.rendered(SCRIPT.parents[1], wanted).values()
    assert "forward_kernel" in told["source"] and told["flags"] and len(told["hash"]) == 16
