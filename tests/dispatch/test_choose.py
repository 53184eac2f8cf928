"""Which kernel a problem gets, in which order, and that the answer says why."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fagen
from fagen import env, explanation, families, target
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.dispatch import choose, kernels, resolve
from fagen.dispatch.choose import Choice
from fagen.dispatch.plan import Plan
from fagen.families import Config
from fagen.ops.attention import fallback
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.ops.attention.problem import Problem
from fagen.runtime import binding
from tests.support.calls import right

FAMILY = families.get("cpu_forward")
HERE = target.host()
PROBLEM = Problem(dtype="fp32", head_dim=16, mask="causal", heads=2, seqlen_q=64)
OTHERS = [*families.candidates(PROBLEM, HERE)[1]]  # which cannot serve it


@pytest.fixture(autouse=True)
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path))
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path / "shipped", tmp_path))
    yield tmp_path
    if binding._module is not None:
        resolve.forget()


def other_config(different_from: Config | None = None) -> Config:
    """Some legal config that is not the default."""
    default = FAMILY.default(PROBLEM, HERE)
    for knob in FAMILY.knobs:
        for choice in knob.choices:
            config = default.replace(**{knob.name: choice})
            if config not in (default, different_from) and not FAMILY.rejects(PROBLEM, HERE, config):
                return config
    raise AssertionError("the family has a single legal config")


def record(problem: Problem = PROBLEM, config: dict | None = None, **changes: object) -> Record:
    fields: dict = {
        "problem": problem, "arch": "cpu", "device": HERE.device, "family": FAMILY.name,
        "config": dict(other_config()) if config is None else config, "seconds": 1e-3, "spread": 1e-5,
        "default_seconds": 2e-3, "error": 1e-6, "source_hash": "0" * 16, "date": "2026-01-01",
    }  # fmt: skip
    return Record(**fields | changes)


def chosen(*records: Record, problem: Problem = PROBLEM) -> Choice:
    merge.put(records)
    return choose.choose(problem, HERE)


def test_never_tuned() -> None:
    choice = chosen()
    assert (choice.kind, choice.provenance) == ("family", "default") and choice.family is FAMILY
    assert choice.config == FAMILY.default(PROBLEM, HERE) and choice.record is None
    assert [r.partition(":")[0] for r in choice.reasons] == [*OTHERS, "exact", "nearest", "arch"]


def test_an_exact_record_wins() -> None:
    near = record(PROBLEM.replace(seqlen_q=65, seqlen_k=65), dict(other_config(other_config())))
    choice = chosen(near, record())
    assert (choice.provenance, choice.config, choice.record.problem) == ("exact", other_config(), PROBLEM)
    assert [r.partition(":")[0] for r in choice.reasons] == OTHERS


def test_then_the_nearest_size() -> None:
    far = record(PROBLEM.replace(seqlen_q=4096, seqlen_k=4096), dict(FAMILY.default(PROBLEM, HERE)))
    near = record(PROBLEM.replace(seqlen_q=128, seqlen_k=128))
    choice = chosen(far, near)
    assert (choice.provenance, choice.config) == ("nearest", other_config())
    assert any(r.startswith("exact: no usable record") for r in choice.reasons)


def test_then_another_device_of_the_architecture() -> None:
    choice = chosen(record(device="Another CPU"))
    assert (choice.provenance, choice.config) == ("arch", other_config())


def test_other_static_keys_do_not_count() -> None:
    assert chosen(record(PROBLEM.replace(mask="none", window_right=-1))).provenance == "default"
    assert chosen(record(arch="sm_80", device="NVIDIA A100")).provenance == "default"


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
    choice = chosen(record(**changes), near)
    assert choice.provenance == "nearest" and choice.record == near
    assert any(words in reason and PROBLEM.key in reason for reason in choice.reasons), choice.reasons


def test_a_record_that_breaks_a_constraint_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = families.Constraint("no_luck", lambda p, t, c: "7 > 6" if c == other_config() else None)
    strict = dataclasses.replace(FAMILY, constraints=(*FAMILY.constraints, broken))
    exact = record()
    monkeypatch.setattr(families, "all_families", lambda: (strict,))
    choice = chosen(exact)
    assert choice.provenance == "default"
    assert any("no_luck: 7 > 6" in reason for reason in choice.reasons)


def test_the_next_family_when_the_first_has_no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    never = families.Constraint("never", lambda p, t, c: "no config of this one fits")
    first = dataclasses.replace(FAMILY, name="first", constraints=(never,))
    monkeypatch.setattr(families, "all_families", lambda: (first, FAMILY))
    choice = chosen()
    assert choice.family is FAMILY and any(r.startswith("first: its default does not fit") for r in choice.reasons)


def test_pytorch_when_no_family_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    others = tuple(family for family in families.all_families() if not family.last_resort)
    monkeypatch.setattr(families, "all_families", lambda: others)
    choice = choose.choose(Problem(dtype="fp32", head_dim=300), target.known("sm_90"))
    assert (choice.kind, choice.provenance, choice.family) == ("torch", "none", None)
    assert {r.partition(":")[0] for r in choice.reasons} == {
        f.name for f in families.all_families() if f.op == "forward"
    }


# ---- where PyTorch was faster -------------------------------------------------------------------------------------


SLOW = {"seconds": 3e-3, "spread": 1e-4, "torch_seconds": 2e-3}
NEAR = PROBLEM.replace(seqlen_q=128, seqlen_k=128)


@pytest.mark.parametrize(("where", "provenance"), [(PROBLEM, "exact"), (NEAR, "nearest")])
def test_pytorch_serves_where_it_was_faster_when_tuned(where: Problem, provenance: str) -> None:
    lost = record(where, **SLOW)
    choice = chosen(lost)
    assert (choice.kind, choice.provenance, choice.family, choice.record) == ("torch", provenance, None, lost)
    told = f"cpu_forward: PyTorch was faster when tuned: 2 ms against 3 ms ({provenance} record {where.key})"
    assert choice.reasons[0] == told
    ours = choose.choose(PROBLEM, HERE, ours=True)
    assert (ours.kind, ours.provenance, ours.config) == ("family", provenance, other_config())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"torch_seconds": 0.0}, "it was not measured"),
        ({"torch_seconds": 2.95e-3}, "within the noise"),
        ({"torch_seconds": 2.99e-3, "spread": 0.0}, "below what counts"),
        ({"torch_seconds": 4e-3}, "it lost"),
        ({"device": "Another CPU"}, "measured elsewhere"),
    ],
)
def test_our_kernel_serves_where_pytorch_is_not_known_to_be_faster(changes: dict, why: str) -> None:
    assert chosen(record(**SLOW | changes)).kind == "family", why


@pytest.mark.parametrize(
    "changes",
    [
        {"seqlen_k": 128},  # a causal mask that SDPA aligns elsewhere
        {"mask": "window", "window_left": 9, "window_right": 0},
        {"mask": "intervals", "intervals": "lower1", "window_right": 0},
        {"softcap": True},
        {"alibi": True},
    ],
)
def test_our_kernel_serves_what_sdpa_cannot_compute_without_a_mask_tensor(changes: dict) -> None:
    asked = PROBLEM.replace(**changes)
    choice = chosen(record(asked, **SLOW), problem=asked)
    assert (choice.kind, choice.provenance) == ("family", "exact")
    if asked.static_key == PROBLEM.static_key:  # timed with a mask tensor, which says nothing of SDPA without one
        assert choose.choose(PROBLEM, HERE).kind == "family"


def test_another_family_that_beat_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(FAMILY, name="other_forward")
    monkeypatch.setattr(families, "all_families", lambda: (FAMILY, other))
    lost = record(**SLOW | {"seconds": 2.2e-3})
    assert chosen(lost, record(family=other.name, **SLOW)).kind == "torch", "that one lost as well"
    # a run of its own, on a day on which everything took longer
    won = record(family=other.name, seconds=2.5e-3, torch_seconds=2.8e-3)
    choice = chosen(won)
    assert (choice.kind, choice.family, choice.provenance) == ("family", other, "exact")
    assert chosen(record(family=other.name, seconds=2.4e-3)).kind == "torch", "no time of PyTorch in that run"
    assert chosen(record(family=other.name, seconds=2.4e-3), record(**SLOW | {"torch_seconds": 2.5e-3})).family is other


def test_a_call_that_pytorch_computes_faster_is_served_by_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning and without building a kernel; who wants the LSE, which SDPA does not give, gets our kernel."""
    from fagen import api
    from fagen.build import cache

    if not api._ops_registered():
        pytest.skip("no binding here")
    monkeypatch.setenv("FAGEN_STALE", "trust")  # it is not verified, which builds as well
    asked, made = [], []
    by_sdpa, built = fallback._by_sdpa, kernels.built
    monkeypatch.setattr(fallback, "_by_sdpa", lambda *words: asked.append(words) or by_sdpa(*words))
    monkeypatch.setattr(kernels, "built", lambda *words: made.append(words) or built(*words))
    monkeypatch.setattr(kernels, "loaded", lambda *words: None)  # an earlier test may have built it
    merge.put([record(**SLOW)])
    resolve.forget()
    q, k, v = (torch.randn(1, 64, 2, 16) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = fagen.attention(q, k, v, causal=True)
        assert len(asked) == 1 and not made
        out, lse = fagen.attention(q, k, v, causal=True, return_lse=True)
        assert len(asked) == 1 and len(made) == 1
        fagen.attention(q, k, v, causal=True)
        assert len(asked) == 2 and len(made) == 1, "each kind of call keeps its answer"
        given = torch.empty_like(q)
        fagen.attention(q, k, v, causal=True, out=given)
        assert len(asked) == 3 and torch.equal(given, plain)
    assert right(plain, q, k, v, causal=True) and right((out, lse), q, k, v, causal=True)
    assert cache.lookup(KernelSpec(FAMILY, PROBLEM, HERE, other_config())) is not None


def test_explain_says_that_pytorch_was_faster() -> None:
    merge.put([record(**SLOW)])
    q = torch.randn(1, 64, 2, 16)
    report = fagen.explain(q, q, q, causal=True)
    text = str(report)
    assert "picked   PyTorch (exact: faster than our kernel when tuned)" in text
    assert "not      cpu_forward: PyTorch was faster when tuned: 2 ms against 3 ms" in text
    assert f"record   {PROBLEM.key}: 3 ms" in text and report.built is None
    told = report.to_dict()
    assert (told["kind"], told["provenance"], told["record"]) == ("torch", "exact", PROBLEM.key)
    assert told["provenance_record"]["torch_seconds"] == 2e-3
    assert fagen.explain(q, q, q, causal=True, return_lse=True).choice.kind == "family"


# ---- explain ------------------------------------------------------------------------------------------------------


def test_explain_reads_well_and_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "cache"))
    q = torch.randn(1, 64, 2, 16)
    merge.put([record()])
    report = fagen.explain(q, q, q, causal=True)
    text = str(report)
    assert "picked   cpu_forward (exact: tuned on this device" in text and "built    not yet" in text
    assert PROBLEM.key in text and "not      sm80_forward: needs a GPU" in text
    assert not list((tmp_path / "cache").glob("kernels/*"))
    fields = report.to_dict()
    assert fields["kind"] == "family" and fields["built"] is False and fields["record"] == PROBLEM.key


def test_explain_says_where_a_winner_comes_from(tmp_path: Path) -> None:
    hash_today = KernelSpec(FAMILY, PROBLEM, HERE, other_config()).hash
    environment = {
        "fagen": "0.0.9",
        "torch": "2.0.1",
        "cxx": "g++ (Distribution 12.2.0-14+d12) 12.2.0",
        "python": "3.1",
    }
    near = PROBLEM.replace(seqlen_q=128, seqlen_k=128)
    merge.put([record(near, source_hash=hash_today, environment=environment, trials=17)])
    (tmp_path / "cpu" / "odd.json").write_text("{")
    report = explanation.explain_problem(PROBLEM, HERE)
    text = str(report)
    assert (
        f"record   {near.key}: 1 ms ±0.01, 2.00x the default, {HERE.device}, 2026-01-01, best of 17 candidates" in text
    )
    assert f"from     {store.path_of(tmp_path, 'cpu', HERE.device)} (yours)" in text
    assert f"with     fagen 0.0.9, torch 2.0.1, cxx 12.2.0 (here fagen {fagen.__version__}, torch 2." in text
    assert "python" not in text
    assert "apart    1.25 weighted doublings: keys 1.00, rows 0.25" in text
    assert "source   current: " in text
    assert "not      database: database file" in text and "odd.json" in text
    facts = report.to_dict()["provenance_record"]
    assert facts["distance"] == pytest.approx(1.25) and facts["source"] == "current" and facts["owner"] == "yours"


def test_versions_are_told_shortly() -> None:
    nvcc = "Cuda compilation tools, release 13.0, V13.0.88 Build cuda_13.0.r13.0/compiler.36424714_0"
    told = [explanation._version(text) for text in (nvcc, "2.11.0+cu130", "580.159.04", "132", "odd")]
    assert told == ["13.0", "2.11.0+cu130", "580.159.04", "132", "odd"]


def test_the_page_on_the_database_shows_what_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "default_paths", lambda: (env.data_dir("tuning_db"), Path("none")))
    problem = Problem(mask="causal", heads=32, kv_heads=8, seqlen_q=1536)
    text = (Path(__file__).parents[2] / "docs" / "database.md").read_text()
    said = str(explanation.explain_problem(problem, target.known("sm_90"))).splitlines()
    for word in ("picked", "record", "apart"):
        (shown,) = [line for line in text.splitlines() if line.startswith(word + " ")]
        assert any(line.startswith(shown.removesuffix("...")) for line in said), (shown, said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "no kernels for torch.float64"),
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
    answer = resolve.answer
    monkeypatch.setattr(resolve, "answer", lambda *args, **named: used.append(answer(*args, **named)) or used[-1])
    assert api._ops_registered()
    q, k, v = (torch.randn(1, 64, 2, 16) for _ in range(3))
    before = fagen.attention(q, k, v, causal=True)
    merge.put([record()])
    resolve.forget()
    after = fagen.attention(q, k, v, causal=True)
    assert used[-1].kernel.spec.config == other_config()
    for out in (before, after):
        assert right(out, q, k, v, causal=True)
    assert fagen.explain(q, k, v, causal=True).built is True


def test_a_family_that_serves_no_calls_is_there_for_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper, problem = target.known("sm_90"), Problem(dtype="fp32", head_dim=300)

    def with_simt(serves: bool) -> None:
        every = families.all_families()
        simt = dataclasses.replace(families.get("simt_forward"), serves_calls=lambda problem: serves)
        changed = [simt if f.name == simt.name else f for f in every]
        monkeypatch.setattr(families, "all_families", lambda: tuple(changed))

    with_simt(False)
    choice = choose.choose(problem, hopper)
    assert choice.spec is None and any(
        "simt_forward: it serves no calls of this dtype" in reason for reason in choice.reasons
    )
    asked = choose.choose(problem, hopper, idle=True).spec
    assert asked is not None and asked.family.name == "simt_forward"
    with_simt(True)
    served = choose.choose(problem, hopper).spec
    assert served is not None and served.family.name == "simt_forward"


def test_a_family_that_serves_no_calls_leaves_them_to_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper, problem = target.known("sm_90"), Problem(dtype="fp32")
    every = families.all_families()
    for serves, able, serving in (
        (False, ["simt_forward", "sm80_forward_fp32"], ["simt_forward"]),
        (True, ["sm80_forward_fp32"], ["sm80_forward_fp32"]),
    ):
        new = dataclasses.replace(families.get("sm80_forward_fp32"), serves_calls=lambda problem, serves=serves: serves)
        changed = tuple(new if family.name == new.name else family for family in every)
        monkeypatch.setattr(families, "all_families", lambda changed=changed: changed)
        assert [family.name for family in families.candidates(problem, hopper)[0]] == able
        assert [family.name for family in families.serving(problem, hopper)[0]] == serving


def test_the_last_resort_is_no_candidate_beside_another() -> None:
    able, reasons = families.candidates(Problem(dtype="bf16"), target.known("sm_80"))
    assert [family.name for family in able] == ["sm80_forward"]
    assert reasons["simt_forward"] == "the last resort, and sm80_forward serves this"
    able, _ = families.candidates(Problem(dtype="bf16", head_dim=264), target.known("sm_80"))
    assert [family.name for family in able] == ["simt_forward"]


def test_the_family_that_suits_the_sizes_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens, prompts among them, wide heads; the plan of a static key knows these sizes apart."""
    hopper = target.known("sm_90")
    every = tuple(dataclasses.replace(f, serves_calls=lambda problem: True) for f in families.all_families())
    monkeypatch.setattr(families, "all_families", lambda: every)
    steps = DecodeProblem(head_dim=128, mask="causal", page=16, heads=32, kv_heads=8, batch=64, seqlen_k=8192)
    plan = Plan(steps, hopper, (), tuple(families.serving(steps, hopper)[0]))
    seen = set()
    for problem, name in (
        (steps.replace(seqlen_q=2), "sm80_decode"),
        (steps.replace(seqlen_q=15), "sm80_decode"),
        (steps.replace(seqlen_q=16), "sm90_decode"),
        (steps.replace(seqlen_q=2048), "sm90_decode"),
    ):
        spec = choose.choose(problem, hopper).spec
        assert spec is not None and spec.family.name == name
        assert all(other == name for key, other in seen if key == plan.reads(problem))
        seen.add((plan.reads(problem), name))
    wide = choose.choose(steps.replace(head_dim=256, head_dim_v=256, heads=16, kv_heads=1, seqlen_q=1), hopper).spec
    assert wide is not None and wide.family.name == "sm90_decode"
    unaligned = choose.choose(steps.replace(seqlen_q=2048, aligned=False), hopper).spec
    assert unaligned is not None and unaligned.family.name == "sm80_decode"


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({"head_dim": 512}, "sm90_forward_large"),
        ({"head_dim": 64, "head_dim_v": 264, "dtype": "fp16"}, "sm90_forward_large"),
        ({"head_dim": 256}, "sm90_forward"),
        ({"head_dim": 512, "dropout": True}, None),
        ({"head_dim": 512, "aligned": False}, None),
        ({"head_dim": 512, "dtype": "fp32"}, "simt_forward"),
    ],
    ids=str,
)
def test_large_head_dims_have_a_family_on_hopper(fields: dict, first: str | None) -> None:
    able, _ = families.serving(Problem(**fields), target.known("sm_90"))
    assert (able[0].name if able else None) == first
    able, reasons = families.serving(Problem(**fields), target.known("sm_80"))
    assert "sm90_forward_large" in reasons
