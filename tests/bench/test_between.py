"""benchmarks/between.py: the suite is what it claims to be, and the script measures, keeps and refits."""

from __future__ import annotations

import importlib.util
import json
import types
from pathlib import Path

import pytest

from fagen import env, families
from fagen.build import toolchain
from fagen.cli import arguments
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.ops.attention.problem import Problem
from fagen.target import host, known

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks" / "problems" / "h200_between.toml"


@pytest.fixture(scope="module")
def between():
    spec = importlib.util.spec_from_file_location("between", ROOT / "benchmarks" / "between.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_suite_lies_between_what_was_tuned():
    target, tuned = known("sm_90"), store.Database.load([env.data_dir("tuning_db")])
    problems = arguments.problems_in(SUITE, target)
    assert len(problems) == 40
    lengths: dict[str, list[int]] = {}
    for problem in arguments.problems_in(
        SUITE.with_name("hopper.toml"), target
    ):  # of which winners ship where they gain
        lengths.setdefault(problem.static_key, []).append(problem.seqlen_k)
    for problem in problems:
        found = tuned.find(problem, target)
        assert found is None or found[1] != "exact", problem.key
        known_lengths = lengths[problem.static_key]
        assert problem.seqlen_k < max(known_lengths) and problem.seqlen_k not in known_lengths, problem.key
    assert {p.head_dim for p in problems} == {64, 96, 128, 192, 256}
    assert {p.mask for p in problems} == {"none", "causal", "window", "intervals"}


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_it_measures_keeps_and_refits(between, tmp_path, capsys):
    family, target = families.get("cpu_forward"), host()

    def problem(length: int) -> Problem:
        return Problem(dtype="fp32", head_dim=16, mask="causal", heads=2, seqlen_q=length)

    configs = [family.default(problem(64), target), *family.first_configs(problem(64), target)]
    for folder, length, config in (("db", 64, configs[1]), ("db", 256, configs[0]), ("tuned", 100, configs[1])):
        row = Record(
            problem=problem(length), arch="cpu", device=target.device, family=family.name, config=dict(config),
            seconds=1e-3, spread=1e-5, default_seconds=0.0, error=0.0, source_hash="0f",
        )  # fmt: skip
        merge.put([row], tmp_path / folder)
    suite, out = tmp_path / "suite.toml", tmp_path / "out.json"
    suite.write_text(
        '[[problem]]\ndtype = "fp32"\nhead_dim = 16\nmask = "causal"\nheads = 2\nseqlen = [100, 200]\n', newline="\n"
    )
    between.main(
        ["--target", "cpu", "--problems", str(suite), "--db", str(tmp_path / "db"), "--tuned", str(tmp_path / "tuned"),
         "--rounds", "3", "--seconds", "0.05", "--out", str(out)]
    )  # fmt: skip
    data = json.loads(out.read_text())
    first, second = data["rows"]
    assert not first["failed"] and first["tuned"] == "tuned" and "tuned" not in second
    assert [n["size"].split("/")[-1] for n in first["neighbours"]] == ["q64-k64", "q256-k256"]
    assert [n["label"] for n in first["neighbours"]] == ["tuned", "default"]  # a config is timed once
    assert data["summary"]["problems"] == 2 and data["summary"]["tuned"] == 1
    assert "today's weights" in capsys.readouterr().out
    between.main(["--fit", str(out)])
    assert "best_of_3_nearest" in capsys.readouterr().out


def test_the_fit_finds_a_distance_that_the_times_ask_for(between, monkeypatch):
    """Times made so that only the length counts: the size of the same length, and of a hundred times the work, wins."""
    asked = Problem(mask="causal", heads=4, seqlen_q=2048)
    near, far = asked.replace(batch=400), asked.replace(seqlen_q=1024, seqlen_k=1024)
    rows = [
        {
            "problem": asked.key, "fields": asked.to_dict(), "default": "default", "tuned": "neighbour 0",
            "family": "any", "configs": {name: {"name": name} for name in ("neighbour 0", "neighbour 1", "default")},
            "seconds": {"neighbour 0": 1.0, "neighbour 1": 1.5, "default": 2.0},
            "neighbours": [{"problem": near.to_dict(), "label": "neighbour 0", "size": near.size_key},
                           {"problem": far.to_dict(), "label": "neighbour 1", "size": far.size_key}],
        }
    ]  # fmt: skip
    model = types.SimpleNamespace(cost=lambda problem, target, config: {"neighbour 0": 5.0}.get(config.name, 7.0))
    monkeypatch.setattr(families, "get", lambda name: model)
    told = between.summary(rows, known("sm_90"))
    assert told["model_of_3_nearest"] == pytest.approx(1.0)
    assert told["nearest"] == pytest.approx(1.5) and told["best_of_3_nearest"] == pytest.approx(1.0)
    assert told["default"] == pytest.approx(2.0) and told["beyond_5_percent"] == 1
    entries = between.fit(rows, 132)
    assert entries[0]["mean"] == pytest.approx(1.0) and entries[0]["weights"]["waves"] < 1
    assert entries[-1]["mean"] == pytest.approx(1.5)


# ---- the other scripts whose figures stand in documents -------------------------------------------------------------


def _script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_what_documents_say_of_the_search_is_what_its_data_say():
    noise = _script("search_noise")
    data = json.loads((ROOT / "benchmarks" / "h200_search_noise.json").read_text())
    told = [noise.tell("", run) for run in data.values()]
    assert [text.split("final round ")[1].split(" over")[0] for text in told] == ["4.3%", "1.9%", "2.1%"]
    assert [text.split("winner ")[1].split(",")[0] for text in told] == ["2.6%", "1.2%", "4.9%"]


def test_dealing_counts_a_small_case_by_hand(monkeypatch):
    dealing = _script("dealing")
    monkeypatch.setattr(dealing, "BLOCKS", 2)
    order = [4.0, 3.0, 2.0, 1.0]
    assert dealing.late(order) == dealing.balanced(order) == 5.0
    assert dealing.early(order) == 6.0  # whoever begins the longest takes the third
    assert dealing.unseen(192, 192, 128) == pytest.approx(6 / 4 - 1)
