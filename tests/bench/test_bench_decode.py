"""fagen bench --op decode: its suite, who takes part, what a row says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fagen import target
from fagen.bench import peers, rows, suites
from fagen.cli import main
from fagen.errors import UsageError
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.ops.attention.problem import Problem

pytestmark = pytest.mark.usefixtures("quick_machine")

CPU, GPU = target.Target("cpu", "any", 2), target.known("sm_90")


def test_the_suite_has_rows_of_its_own() -> None:
    for where in (CPU, GPU):
        found = suites.suite("decode", where, op="decode")
        assert len({row.name for row in found}) == len(found) >= 8
        assert all(isinstance(row.problem, DecodeProblem) for row in found)
        assert {row.problem.page for row in found} == {0, 1, 16, 64}
        assert any(row.problem.kv_dtype for row in found) and any(row.problem.seqlen_q > 1 for row in found)
        assert suites.default(where, "decode") == "decode"
    with pytest.raises(UsageError, match="suite decode"):
        suites.suite("decode", CPU)
    with pytest.raises(UsageError, match="suite decode"):
        suites.suite("peers", GPU, op="decode")
    for problem, op in ((Problem(), "decode"), (DecodeProblem(), "forward"), (DecodeProblem(), "backward")):
        with pytest.raises(UsageError, match="no problem of"):
            rows.as_op(problem, op)


def test_only_sdpa_is_timed_on_a_cache() -> None:
    here, absent = peers.load(["sdpa", "math"], "cpu", {}, "decode")
    assert set(here) == {"sdpa"} and absent["math"] == "it computes no decode here"


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = "--dtype fp32 --head-dim 16 --heads 4 --kv-heads 2 --batch 2 --seqlen 64 --page 0,16".split()
    words = ["bench", "--op", "decode", "--target", "cpu", *problem, "--rounds", "2", "--min-time", "0.001"]
    out = tmp_path / "result.json"
    assert main.main([*words, "--peers", "sdpa", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["op"], result["complete"]) == ("decode", True)
    contiguous, paged = result["rows"]
    for row in (contiguous, paged):
        assert row["participants"]["fagen"]["outcome"] == "ok" and row["choice"]["family"] == "cpu_decode"
        problem_of_row = DecodeProblem.from_dict(row["problem"])
        assert (row["length"], row["bytes"]) == (64, problem_of_row.bytes())
        assert row["flops"] == problem_of_row.flops()
    assert contiguous["participants"]["sdpa"]["outcome"] == "ok"
    assert paged["participants"]["sdpa"]["outcome"] == "cannot"
    capsys.readouterr()
