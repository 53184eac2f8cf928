"""A run that is resumed reads its lines as data from anywhere: what makes no sense is skipped, and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fagen.target import host
from fagen.tuner import journal, progress, resumed, tune
from fagen.tuner.result import Options, Tuned
from tests.support.fake_family import FAMILY, PROBLEM

HUGE = 10**400
CONFIG = {"style": "plain", "variant": 2}
GOOD: dict[str, Any] = {
    "problem": PROBLEM.key, "family": FAMILY.name, "config": CONFIG, "outcome": "ok", "reason": "", "seconds": 1e-3,
    "spread": 1e-5, "samples": 9, "measure_seconds": 0.1, "error": 1e-6, "facts": {"registers": 4},
    "device": {"gpu": "x", "throttle": []}, "remeasured": 0, "source_hash": "01d", "date": "2026-01-01",
}  # fmt: skip
FAILED = {**GOOD, "outcome": "compile", "reason": "no", "seconds": None, "spread": None, "samples": 0, "error": None}
STRANGE: list[Any] = [
    {}, {"outcome": "ok"}, {"outcome": ["ok"]}, {**GOOD, "outcome": "fine"}, {**GOOD, "problem": 1},
    {**GOOD, "problem": None}, {**GOOD, "family": "nobody"}, {**GOOD, "family": [1]}, {**GOOD, "config": [1]},
    {**GOOD, "config": None}, {**GOOD, "config": {}}, {**GOOD, "config": {**CONFIG, "variant": "2"}},
    {**GOOD, "config": {**CONFIG, "variant": [2]}}, {**GOOD, "config": {**CONFIG, "more": 1}},
    {**GOOD, "seconds": None}, {**GOOD, "seconds": 0}, {**GOOD, "seconds": "1"}, {**GOOD, "seconds": True},
    {**GOOD, "seconds": float("nan")}, {**GOOD, "seconds": HUGE}, {**GOOD, "spread": None}, {**GOOD, "spread": [1]},
    {**GOOD, "samples": 0}, {**GOOD, "samples": 1.5}, {**GOOD, "samples": None}, {**GOOD, "error": "none"},
    {**GOOD, "reason": None}, {**GOOD, "device": "gpu"}, {**GOOD, "facts": [1]}, {**GOOD, "host": 3},
    {name: value for name, value in GOOD.items() if name != "reason"},
]  # fmt: skip
WINNER = {
    "problem": PROBLEM.to_dict(),
    "complete": True,
    "outcomes": {"ok": 1},
    "family": FAMILY.name,
    "config": CONFIG,
}
STRANGE_WINNERS: list[Any] = [
    {}, {**WINNER, "colour": 1}, {**WINNER, "problem": PROBLEM.key}, {**WINNER, "problem": {"batch": HUGE}},
    {**WINNER, "problem": {"aligned": "true; x"}}, {**WINNER, "complete": "yes"}, {**WINNER, "outcomes": {"ok": "1"}},
    {**WINNER, "outcomes": None}, {**WINNER, "seconds": "1"}, {**WINNER, "seconds": HUGE}, {**WINNER, "config": [1]},
    {**WINNER, "why": 1}, {**WINNER, "family": None},
    {name: value for name, value in WINNER.items() if name != "outcomes"},
]  # fmt: skip


def test_strange_candidates_are_skipped(fake: Path) -> None:
    notes: list[str] = []
    assert resumed.candidates([GOOD, *STRANGE, FAILED], notes.append) == [GOOD, FAILED]
    assert notes == [f"{len(STRANGE)} of the run's candidates cannot be understood, and are skipped"]
    assert resumed.candidates([GOOD, FAILED], notes.append) == [GOOD, FAILED] and len(notes) == 1


@pytest.mark.parametrize("row", [row for row in STRANGE if row], ids=lambda row: ascii(row)[-40:])
def test_each_strange_candidate_is_one(fake: Path, row: Any) -> None:
    assert not resumed.is_candidate(row)


def test_strange_winners_are_skipped(fake: Path) -> None:
    notes: list[str] = []
    assert resumed.winners([*STRANGE_WINNERS, WINNER], notes.append) == [Tuned(**WINNER)]
    assert notes == [f"{len(STRANGE_WINNERS)} of the run's winners cannot be understood, and are skipped"]


def test_a_run_with_strange_lines_goes_on(fake: Path, capsys: pytest.CaptureFixture) -> None:
    options = Options(runs=fake / "runs", resume="latest", trials=1, workers=1)
    mark = tune.fingerprint([PROBLEM], host(), options)
    with_lines = journal.Run.create(fake / "runs", "odd", {"fingerprint": mark})
    for name, rows in ((journal.TRIALS, [GOOD, *STRANGE]), (journal.WINNERS, [*STRANGE_WINNERS, WINNER])):
        lines = [*map(json.dumps, rows), "[" * 100_000, "9" * 10_000, '"text"', "null", "\x00"]
        (with_lines.path / name).write_text("".join(f"{line}\n" for line in lines))
    with_lines.close()
    report = tune.run([PROBLEM], host(), options, progress.Lines())
    assert report.run == with_lines.path and report.results == [Tuned(**WINNER)]
    said = capsys.readouterr().err
    assert f"{len(STRANGE)} of the run's candidates cannot be understood" in said
    assert f"{len(STRANGE_WINNERS)} of the run's winners cannot be understood" in said
