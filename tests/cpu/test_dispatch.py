"""Which kernel a problem gets, in which order, and that the answer says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fagen
from fagen import binding, db, dispatch, env, fallback, families, target, trust, verify
from fagen.families import Config
from fagen.problem import Problem

FAMILY = families.get("cpu_forward")
OTHERS = [family.name for family in families.all_families() if family is not FAMILY]
HERE = target.host()
PROBLEM = Problem(dtype="fp32", head_dim=16, mask="causal", heads=2, seqlen_q=64)


@pytest.fixture(autouse=True)
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path))
    monkeypatch.setattr(db, "default_paths", lambda: (tmp_path / "shipped", tmp_path))
    monkeypatch.setattr(fallback, "_warned", set())
    yield tmp_path
    if binding._module is not None:
        binding.forget()


def other_config(different_from: Config | None = None) -> Config:
    """Some legal config that is not the default."""
    default = FAMILY.default(PROBLEM, HERE)
    for knob in FAMILY.knobs:
        for choice in knob.choices:
            config = default.replace(**{knob.name: choice})
            if config not in (default, different_from) and not FAMILY.rejects(PROBLEM, HERE, config):
                return config
    raise AssertionError("the family has a single legal config")


def record(problem: Problem = PROBLEM, config: dict | None = None, **changes: object) -> db.Record:
    fields: dict = {
        "problem": problem, "arch": "cpu", "device": HERE.device, "family": FAMILY.name,
        "config": dict(other_config()) if config is None else config, "seconds": 1e-3, "spread": 1e-5,
        "default_seconds": 2e-3, "error": 1e-6, "source_hash": "0" * 16, "date": "2026-01-01",
    }  # fmt: skip
    return db.Record(**fields | changes)


def choose(*records: db.Record, problem: Problem = PROBLEM) -> dispatch.Choice:
    db.put(records)
    return dispatch.choose(problem, HERE)


def test_never_tuned() -> None:
    choice = choose()
    assert (choice.kind, choice.provenance) == ("family", "default") and choice.family is FAMILY
    assert choice.config == FAMILY.default(PROBLEM, HERE) and choice.record is None
    assert [r.partition(":")[0] for r in choice.reasons] == [*OTHERS, "exact", "nearest", "arch"]


def test_an_exact_record_wins() -> None:
    near = record(PROBLEM.replace(seqlen_q=65, seqlen_k=65), dict(other_config(other_config())))
    choice = choose(near, record())
    assert (choice.provenance, choice.config, choice.record.problem) == ("exact", other_config(), PROBLEM)
    assert [r.partition(":")[0] for r in choice.reasons] == OTHERS


def test_then_the_nearest_size() -> None:
    far = record(PROBLEM.replace(seqlen_q=4096, seqlen_k=4096), dict(FAMILY.default(PROBLEM, HERE)))
    near = record(PROBLEM.replace(seqlen_q=128, seqlen_k=128))
    choice = choose(far, near)
    assert (choice.provenance, choice.config) == ("nearest", other_config())
    assert any(r.startswith("exact: no usable record") for r in choice.reasons)


def test_then_another_device_of_the_architecture() -> None:
    choice = choose(record(device="Another CPU"))
    assert (choice.provenance, choice.config) == ("arch", other_config())


def test_other_static_keys_do_not_count() -> None:
    assert choose(record(PROBLEM.replace(mask="none", window_right=-1))).provenance == "default"
    assert choose(record(arch="sm_80", device="NVIDIA A100")).provenance == "default"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"colour": 1}}, "no knob 'colour'"),
        ({"config": {}}, "lacks knob"),
        ({"family": "sm80_forward", "config": {}}, "needs a GPU"),
        ({"family": "sm42_forward"}, "no such family"),
    ],
)
def test_a_record_that_does_not_fit_is_skipped_with_a_reason(changes: dict, words: str) -> None:
    near = record(PROBLEM.replace(seqlen_q=128, seqlen_k=128))
    choice = choose(record(**changes), near)
    assert choice.provenance == "nearest" and choice.record == near
    assert any(words in reason and PROBLEM.key in reason for reason in choice.reasons), choice.reasons


def test_a_record_that_breaks_a_constraint_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = families.Constraint("no_luck", lambda p, t, c: "7 > 6" if c == other_config() else None)
    strict = dataclasses.replace(FAMILY, constraints=(*FAMILY.constraints, broken))
    exact = record()
    monkeypatch.setattr(families, "all_families", lambda: (strict,))
    choice = choose(exact)
    assert choice.provenance == "default"
    assert any("no_luck: 7 > 6" in reason for reason in choice.reasons)


def test_the_next_family_when_the_first_has_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    never = families.Constraint("never", lambda p, t, c: "no config of this one fits")
    first = dataclasses.replace(FAMILY, name="first", constraints=(never,))
    monkeypatch.setattr(families, "all_families", lambda: (first, FAMILY))
    choice = choose()
    assert choice.family is FAMILY and any(r.startswith("first: its default does not fit") for r in choice.reasons)


def test_pytorch_when_no_family_serves() -> None:
    choice = dispatch.choose(Problem(dtype="fp32"), target.known("sm_90"))
    assert (choice.kind, choice.provenance, choice.family) == ("torch", "none", None)
    assert {r.partition(":")[0] for r in choice.reasons} == {f.name for f in families.all_families()}


# ---- explain ------------------------------------------------------------------------------------------------------


def test_explain_reads_well_and_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "cache"))
    q = torch.randn(1, 64, 2, 16)
    db.put([record()])
    report = fagen.explain(q, q, q, causal=True)
    text = str(report)
    assert "picked   cpu_forward (exact: tuned on this device" in text and "built    not yet" in text
    assert PROBLEM.key in text and "not      sm80_forward: needs a GPU" in text
    assert not list((tmp_path / "cache").glob("kernels/*"))
    fields = report.to_dict()
    assert fields["kind"] == "family" and fields["built"] is False and fields["record"] == PROBLEM.key


def test_explain_says_where_a_winner_comes_from(tmp_path: Path) -> None:
    hash_today = trust.current_hash(FAMILY, PROBLEM, HERE, other_config())
    environment = {
        "fagen": "0.0.9",
        "torch": "2.0.1",
        "cxx": "g++ (Distribution 12.2.0-14+d12) 12.2.0",
        "python": "3.1",
    }
    near = PROBLEM.replace(seqlen_q=128, seqlen_k=128)
    db.put([record(near, source_hash=hash_today, environment=environment, trials=17)])
    (tmp_path / "cpu" / "odd.json").write_text("{")
    report = dispatch.explain_problem(PROBLEM, HERE)
    text = str(report)
    assert (
        f"record   {near.key}: 1 ms ±0.01, 2.00x the default, {HERE.device}, 2026-01-01, best of 17 candidates" in text
    )
    assert f"from     {db.path_of(tmp_path, 'cpu', HERE.device)} (yours)" in text
    assert f"with     fagen 0.0.9, torch 2.0.1, cxx 12.2.0 (here fagen {fagen.__version__}, torch 2." in text
    assert "python" not in text
    assert "apart    1.25 weighted doublings: keys 1.00, rows 0.25" in text
    assert "source   current: " in text
    assert "not      database: database file" in text and "odd.json" in text
    facts = report.to_dict()["provenance_record"]
    assert facts["distance"] == pytest.approx(1.25) and facts["source"] == "current" and facts["owner"] == "yours"


def test_versions_are_told_shortly() -> None:
    nvcc = "Cuda compilation tools, release 13.0, V13.0.88 Build cuda_13.0.r13.0/compiler.36424714_0"
    told = [dispatch._version(text) for text in (nvcc, "2.11.0+cu130", "580.159.04", "132", "odd")]
    assert told == ["13.0", "2.11.0+cu130", "580.159.04", "132", "odd"]


def test_the_page_on_the_database_shows_what_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "default_paths", lambda: (env.data_dir("tuning_db"), Path("none")))
    problem = Problem(mask="causal", heads=32, kv_heads=8, seqlen_q=1536)
    text = (Path(__file__).parents[2] / "docs" / "database.md").read_text()
    said = str(dispatch.explain_problem(problem, target.known("sm_90"))).splitlines()
    for word in ("picked", "record", "apart"):
        (shown,) = [line for line in text.splitlines() if line.startswith(word + " ")]
        assert any(line.startswith(shown.removesuffix("...")) for line in said), (shown, said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "no kernels for torch.float64"),
        ({"requires_grad": True}, "no backward kernel"),
        ({"device": "meta"}, "no kernels for device meta"),
    ],
)
def test_explain_says_why_pytorch(change: dict, words: str) -> None:
    q = torch.zeros(1, 8, 2, 16, **change)
    report = fagen.explain(q, q, q)
    assert "picked   PyTorch" in str(report) and words in str(report)
    assert report.to_dict()["kind"] == "torch"


# ---- and the op obeys ---------------------------------------------------------------------------------------------


def test_attention_runs_the_recorded_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    from fagen import api

    used = []
    answer = api.answer
    monkeypatch.setattr(api, "answer", lambda *args: used.append(answer(*args)) or used[-1])
    assert api._ops_registered()
    q, k, v = (torch.randn(1, 64, 2, 16) for _ in range(3))
    before = fagen.attention(q, k, v, causal=True)
    db.put([record()])
    binding.forget()
    after = fagen.attention(q, k, v, causal=True)
    assert used[-1].kernel.config == other_config()
    for out in (before, after):
        assert verify.check(out, None, q, k, v, verify.Semantics((-1, 0)), layout="bshd")
    assert fagen.explain(q, k, v, causal=True).built is True
