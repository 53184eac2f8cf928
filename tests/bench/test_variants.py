"""benchmarks/variants.py on real kernels: checkouts' sources are timed in turn, and what hangs or is wrong is told."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from fagen import target
from fagen.errors import UsageError
from tests.support import runs

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
ROW = "fp32/d64/causal/b1/h8-8/q512-k512"


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))  # where the worker finds it as well
    return importlib.import_module("variants")


def rendered(variants, tmp_path: Path, label: str, *cases: str) -> Path:
    out, file = tmp_path / "variants.json", tmp_path / f"{label}.txt"
    file.write_text("# cases\n\n" + "\n".join(cases) + "\n")
    assert variants.main(["render", label, str(file), "--target", "cpu", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("decode", "sm80_decode"),
        ("mla", "sm90_decode_mla"),
        ("sm90_decode", "sm90_decode"),
        ("fp8", "sm90_forward_fp8"),
        ("large", "sm90_forward_large"),
    ],  # fmt: skip
)
def test_the_kept_cases_are_rows_and_configs_of_today(variants, name: str, family: str) -> None:
    """Each line names a row and a legal config of it, and no two are one kernel."""
    where = target.known("sm_90")
    table = variants.all_rows(where)
    lines = (FOLDER / "problems" / f"{name}_variants.txt").read_text().splitlines()
    found = [variants.case(line, table, where, family) for line in lines if not line.startswith("#")]
    assert [one for one in found if isinstance(one, str)] == []
    assert len({(row.name, config) for row, _, config in found}) == len(found)


@pytest.mark.slow
def test_two_checkouts_are_timed_and_the_bad_ones_told(variants, tmp_path, monkeypatch, capsys):
    beginning = ROW[:-5]
    rendered(variants, tmp_path, "before", f"{beginning}: tile_n=64", f"{beginning}: no_such_knob=3")
    out = rendered(variants, tmp_path, "after", f"{beginning}: tile_n=128", f"{beginning}: tile_n=256")
    assert "left out" in capsys.readouterr().out
    before, after, other = json.loads(out.read_text())
    assert (before["label"], after["label"], before["row"]) == ("before", "after", ROW)
    assert before["source"] != after["source"]

    launch = "int fagen_launch("
    assert other["source"].count(launch) == 1
    body = f'\n#include <unistd.h>\nextern "C" {launch}const fagen_forward_params*, void*) {{ %s return 0; }}\n'
    endless = "for (volatile int forever = 1; forever;) usleep(1000);"
    without = other["source"].replace(launch, "int fagen_unused(")
    hung = other | {
        "label": "hung",
        "source": without + body % endless,
    }
    wrong = other | {"label": "wrong", "source": without + body % ""}
    broken = other | {"label": "broken", "source": "#error not today\n"}
    again = [
        hung | {"config": hung["config"] | {"tile_n": n}, "source": f"{hung['source']}// {n}\n"} for n in (512, 1024)
    ]
    same = before | {"label": "same"}
    out.write_text(json.dumps([before, same, hung, *again, wrong, broken, after]))

    seconds = runs.patient(10.0)
    monkeypatch.setattr(variants, "ANSWER_SECONDS", seconds)
    monkeypatch.setattr(target, "gpu", lambda index=0: None)
    result = tmp_path / "timed.json"
    words = ["time", str(out), "--peers", "sdpa", "--base", "before", "--min-time", "0.1", "--rounds", "3"]
    assert variants.main([*words, "--out", str(result)]) == 0
    facts = json.loads(result.read_text())["rows"][ROW]
    outcomes = [(name.split()[0], fact["outcome"]) for name, fact in facts.items()]
    hangs = [("hung", "crash"), ("hung", "crash"), ("hung", "left out")]
    assert sorted(outcomes) == sorted([("before", "ok"), *hangs, ("wrong", "wrong"), ("after", "ok"), ("sdpa", "ok")])
    assert all(fact["seconds"] > 0 for fact in facts.values() if fact["outcome"] == "ok")
    said = capsys.readouterr().out
    assert (
        "not built: broken" in said
        and f"same is before: {ROW}" in said
        and f"no answer within {seconds:.0f} s" in said
        and " of the best peer" in said
    )
    assert "1.000 of before" in said


def test_a_row_that_is_not_there_is_said(variants, tmp_path):
    with pytest.raises(UsageError, match="no row begins with 'd17 full'"):
        rendered(variants, tmp_path, "x", "d17 full: tile_m=32")
