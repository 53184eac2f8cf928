"""A record that found nothing better than its size's default lets the default speak at other sizes."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fagen
from fagen import api, env, explanation, families, target
from fagen.bench import family as bench_family
from fagen.build import toolchain
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.dispatch import choose, freshness, kernels, resolve, warmup
from fagen.dispatch.plan import ASK, Answer, Plan
from fagen.families import Config, Reads
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.measures import MEASURES, AtMost
from fagen.ops.attention.problem import Problem
from fagen.ops.attention.tiling import Cheaper, Short, Tiling
from fagen.runtime import background, binding
from tests.support.calls import right

HERE, H200, BASE = target.host(), target.known("sm_90"), families.get("cpu_forward")
PROBLEM = Problem(dtype="fp32", head_dim=16, mask="causal", heads=2, seqlen_q=64)
FEW = 100  # keys


def _configs() -> list[Config]:
    default = BASE.default(PROBLEM, HERE)
    others = (default.replace(**{knob.name: choice}) for knob in BASE.knobs for choice in knob.choices)
    return [c for c in dict.fromkeys([default, *others]) if not BASE.rejects(PROBLEM, HERE, c)][:3]


MANY_KEYS, FEW_KEYS, OTHER = _configs()
FAMILY = dataclasses.replace(
    BASE,
    default=lambda p, t: FEW_KEYS if p.seqlen_k < FEW else MANY_KEYS,
    default_reads=Reads(lambda p, t: (AtMost("keys", FEW - 1),)),
)


@pytest.fixture(autouse=True)
def one_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(families, "all_families", lambda: (FAMILY,))
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path,))
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path))
    resolve.forget()
    yield
    resolve.forget()


def sized(length: int) -> Problem:
    return PROBLEM.replace(seqlen_q=length, seqlen_k=length)


def record(length: int, config: Config, **changes: object) -> Record:
    fields: dict = {
        "problem": sized(length), "arch": "cpu", "device": HERE.device, "family": FAMILY.name, "config": dict(config),
        "seconds": 1e-3, "spread": 1e-5, "default_seconds": 1e-3, "error": 1e-6,
        "source_hash": KernelSpec(FAMILY, sized(length), HERE, config).hash,
    }  # fmt: skip
    return Record(**fields | changes)


# ---- what is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [HERE.device, "Another CPU"])
def test_the_default_of_another_size_serves_there(device: str) -> None:
    only = record(64, FEW_KEYS, device=device)
    merge.put([only])
    found = choose.choose(sized(400), HERE)
    assert (found.provenance, found.config, found.record, found.trust) == ("confirmed", MANY_KEYS, only, None)
    assert any("its config is but the default of that size" in r for r in found.reasons)
    like = choose.choose(sized(70), HERE)
    assert (like.provenance, like.config) == ("nearest" if device == HERE.device else "arch", FEW_KEYS)
    told = str(explanation.explain_problem(sized(400), HERE))
    assert f"(confirmed: {choose.PROVENANCES['confirmed']})" in told and only.key in told


def test_a_winner_that_is_no_default_serves_as_ever() -> None:
    merge.put([record(64, OTHER), record(900, FEW_KEYS)])
    for length, provenance, config in ((64, "exact", OTHER), (120, "nearest", OTHER), (901, "nearest", FEW_KEYS)):
        found = choose.choose(sized(length), HERE)
        assert (found.provenance, found.config) == (provenance, config)


def test_a_default_that_is_not_legal_leaves_the_record_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    never = families.Constraint("never", lambda p, t, c: "not this one" if c == MANY_KEYS else None)
    strict = dataclasses.replace(FAMILY, constraints=(*FAMILY.constraints, never))
    monkeypatch.setattr(families, "all_families", lambda: (strict,))
    merge.put([record(64, FEW_KEYS)])
    found = choose.choose(sized(400), HERE)
    assert (found.provenance, found.config) == ("nearest", FEW_KEYS)


def test_pytorch_that_was_faster_serves_all_the_same() -> None:
    merge.put([record(64, FEW_KEYS, torch_seconds=5e-4)])
    assert choose.choose(sized(400), HERE).kind == "torch"
    found = choose.choose(sized(400), HERE, ours=True)
    assert (found.provenance, found.config) == ("confirmed", MANY_KEYS)
    for ours in (False, True):
        assert (resolve.answer(sized(400), HERE, ours=ours).kernel is None) is not ours


def test_a_default_is_not_verified_for_a_record_whose_source_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    merge.put([record(64, FEW_KEYS, source_hash="0" * 16)])
    verified = []
    monkeypatch.setattr(freshness, "_verdicts", {})
    monkeypatch.setattr(freshness, "_read", lambda path: None)
    monkeypatch.setattr(freshness, "_verify", lambda *a: verified.append(a) or freshness.Verification(True, "right"))
    assert choose.choose(sized(400), HERE, check=True).provenance == "confirmed" and not verified
    assert choose.choose(sized(70), HERE, check=True).provenance == "nearest" and len(verified) == 1
    assert choose.choose(sized(400), HERE, stale="refuse").provenance == "default"


def test_a_bench_held_to_the_family_takes_what_dispatch_takes() -> None:
    merge.put([record(64, FEW_KEYS)])
    spec, provenance = bench_family.pick(sized(400), HERE, FAMILY.name)
    assert (spec.config, provenance) == (MANY_KEYS, "confirmed")
    assert bench_family.pick(sized(64), HERE, FAMILY.name)[1] == "exact"


def test_what_is_built_ahead_has_the_defaults() -> None:
    merge.put([record(64, FEW_KEYS), record(4000, OTHER)])
    built = {choose.choose(p, HERE, ours=True).config for p in warmup.sizes(PROBLEM, HERE, 8192)}
    assert built == {MANY_KEYS, FEW_KEYS, OTHER}
    draw = random.Random("ahead")
    for _ in range(200):
        rows = draw.randint(1, 8192)
        size = PROBLEM.replace(batch=draw.randint(1, 9), seqlen_q=rows, seqlen_k=draw.randint(rows, 8192))
        assert choose.choose(size, HERE, ours=True).config in built


# ---- the plan, and the table ----------------------------------------------------------------------------------------


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_a_new_size_asks_python_once_for_each_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert api._ops_registered()
    merge.put([record(64, FEW_KEYS), record(1000, OTHER)])
    asked: list[object] = []
    given = AttentionCall.of_op
    monkeypatch.setattr(AttentionCall, "of_op", lambda a, **own: asked.append(a) or given(a, **own))
    counts = []
    for length in (64, 70, 40, 120, 130, 140, 150, 160, 99, 100, 999, 1000, 800):
        q = torch.randn(1, length, 2, 16)
        assert right(fagen.attention(q, q, q, causal=True), q, q, q, causal=True)
        wanted = choose.choose(sized(length), HERE)
        served = resolve.kernel_for(sized(length), HERE)
        assert served is not None and served.spec.config == wanted.config, length
        counts.append(len(asked))
    # the first and the other default; then the other record, if nobody has built its kernel
    assert counts[:10] == [1, 1, 1, 2, 2, 2, 2, 2, 2, 2] and counts[-1] <= 3


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_what_serves_meanwhile_gives_way_to_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    merge.put([record(64, FEW_KEYS)])
    kernels.built(KernelSpec(FAMILY, PROBLEM, HERE, FEW_KEYS))
    monkeypatch.setenv("FAGEN_BUILD", "background")
    jobs = []
    monkeypatch.setattr(background, "submit", lambda key, work: jobs.append(work) or True)
    mine = {FEW_KEYS: kernels.built(KernelSpec(FAMILY, PROBLEM, HERE, FEW_KEYS))}
    monkeypatch.setattr(kernels, "loaded", lambda spec: mine.get(spec.config))
    for length in (400, 500):
        assert resolve.kernel_for(sized(length), HERE).spec.config == FEW_KEYS
    assert len(jobs) == 1
    mine[MANY_KEYS] = kernels.built(KernelSpec(FAMILY, PROBLEM, HERE, MANY_KEYS))
    resolve.renew(PROBLEM.static_key)  # as the job does
    assert resolve.kernel_for(sized(400), HERE).spec.config == MANY_KEYS
    assert resolve.kernel_for(sized(70), HERE).spec.config == FEW_KEYS


@dataclasses.dataclass(frozen=True)
class Told:
    """In the place of a kernel: a number."""

    number: int

    @property
    def library(self) -> SimpleNamespace:
        return SimpleNamespace(address=lambda name: self.number)


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
@pytest.mark.parametrize("mask", ["none", "causal", "window"])
def test_python_and_the_table_give_the_same_answer(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shipped records, with an answer of its own for each default that a size may read, but for some of them."""
    monkeypatch.undo()
    monkeypatch.setattr(store, "default_paths", lambda: (env.data_dir("tuning_db"),))
    monkeypatch.setattr(kernels, "loaded", lambda *args: None)
    monkeypatch.setattr(resolve, "_answer_of", lambda choice: Answer(True, Told(1 + hash(choice.config) % 2**40)))
    module, draw, told = binding.load(), random.Random(mask), set()
    static = Problem(mask=mask, heads=32, kv_heads=8)
    plan = resolve._make_plan(static, H200)
    speakers = {"", *(row.confirms for row in plan.rows)}
    for _ in range(800):
        fields = {
            "batch": draw.choice([1, 1, 2, 8, 100]), "seqlen_q": round(2 ** draw.uniform(0, 14)),
            "seqlen_k": round(2 ** draw.uniform(0, 17)), "kv_heads": draw.choice([1, 2, 8, 32]),
        }  # fmt: skip
        if mask == "window":
            fields["window_left"] = draw.choice([-1, 100, 5000])
        problem = static.replace(**fields)
        for only in speakers:
            answer = Answer(True, Told(len(plan.defaults) + 2**50)) if draw.random() < 0.9 else ASK
            plan.defaults.setdefault(plan.reads(problem, only), answer)
        p = problem
        sizes = [p.batch, p.heads, p.kv_heads, p.seqlen_q, p.seqlen_k, p.window_left, p.window_right]
        found = plan.find(problem, ours=True)
        _, served = module.nearest(plan.words(ours=True), sizes)
        assert served == (found.kernel.number if found.known else None), problem.key
        told.add(served)
    assert len(told) > 5 and None in told


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_the_table_measures_sizes_as_python_does() -> None:
    module, draw = binding.load(), random.Random("measures")
    for measure in MEASURES:
        seen = set()
        for _ in range(300):
            fields = {name: round(2 ** draw.uniform(0, 10)) for name in ("batch", "seqlen_q", "seqlen_k")}
            fields |= {"heads": 96, "kv_heads": draw.choice([1, 2, 8, 32]), "window_left": draw.choice([-1, 90])}
            problem = Problem(mask="window", window_right=0, **fields)
            tile, limit = draw.choice([1, 64, 128, 192]), draw.choice([-1, 0, 1, 4, 64, 500, 6000])
            test = AtMost(measure, limit, tile)
            family = dataclasses.replace(BASE, default_reads=Reads(lambda p, t, test=test: (test,)))
            plan = Plan(problem, H200, (), (family,), defaults={("", (True,)): Answer(True, Told(7))})
            p = problem
            sizes = [p.batch, p.heads, p.kv_heads, p.seqlen_q, p.seqlen_k, p.window_left, p.window_right]
            holds = test.holds(problem, H200)
            assert module.nearest(plan.words(ours=True), sizes) == (-1, 7 if holds else None), (measure, problem.key)
            seen.add(holds)
        assert len(seen) == 2, measure


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
@pytest.mark.parametrize("mask", ["none", "causal", "window"])
def test_the_table_compares_tilings_as_python_does(mask: str) -> None:
    module, draw = binding.load(), random.Random(f"tilings/{mask}")
    seen: Counter[tuple[str, bool]] = Counter()
    for _ in range(1500):
        fields = {name: round(2 ** draw.uniform(0, 13)) for name in ("seqlen_q", "seqlen_k")}
        fields |= {"batch": draw.choice([1, 2, 7, 64]), "heads": 96, "kv_heads": draw.choice([1, 8, 32, 96])}
        if mask == "window":
            fields |= {"window_left": draw.choice([-1, 0, 90, 1000]), "window_right": draw.choice([-1, 0, 50])}
        problem = Problem(mask=mask, **fields)
        shapes = [(draw.choice([64, 128, 192]), draw.choice([32, 80, 128]), draw.choice([0, 1, 2])) for _ in range(2)]
        one, two = (Tiling(*shape, draw.randint(500, 5000), draw.randint(500, 2000)) for shape in shapes)
        test = draw.choice([Cheaper(one, two), Short(one, draw.choice([20_000, 200_000]))])
        family = dataclasses.replace(BASE, default_reads=Reads(lambda p, t, test=test: (test,)))
        plan = Plan(problem, H200, (), (family,), defaults={("", (True,)): Answer(True, Told(7))})
        p = problem
        sizes = [p.batch, p.heads, p.kv_heads, p.seqlen_q, p.seqlen_k, p.window_left, p.window_right]
        holds = test.holds(problem, H200)
        assert module.nearest(plan.words(ours=True), sizes) == (-1, 7 if holds else None), (test, problem.key)
        seen[type(test).__name__, holds] += 1
    assert len(seen) == 4 and min(seen.values()) > 100, seen
