"""A new size costs nothing: the plan of a static key picks what dispatch picks, in Python and in C++."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fagen
from fagen import api, env, families, target
from fagen.build import cache, toolchain
from fagen.build.job import Job
from fagen.codegen.spec import KernelSpec
from fagen.db import merge, store
from fagen.db.record import Record
from fagen.dispatch import choose, freshness, kernels, resolve
from fagen.dispatch.plan import Answer, Plan, PlannedRecord
from fagen.errors import InvalidArgument
from fagen.families import Config
from fagen.ops import abi
from fagen.ops.attention import fallback, forward, size_point
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import Problem
from fagen.runtime import binding, python_ops
from tests.support.calls import Case, example, right

pytestmark = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
FAMILY, HERE, H200 = families.get("cpu_forward"), target.host(), target.known("sm_90")
PROBLEM = Problem(dtype="fp32", head_dim=16, mask="causal", heads=2, seqlen_q=64)


@pytest.fixture(autouse=True)
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(store, "default_paths", lambda: (tmp_path,))
    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path))
    assert api._ops_registered()
    resolve.forget()
    yield tmp_path
    resolve.forget()


def record(problem: Problem, config: Config, here: target.Target = HERE, **changes: object) -> Record:
    fields: dict = {
        "problem": problem, "arch": here.arch, "device": here.device, "family": FAMILY.name, "config": dict(config),
        "seconds": 1e-3, "spread": 1e-5, "default_seconds": 2e-3, "error": 1e-6, "source_hash": "0" * 16,
    }  # fmt: skip
    if here == HERE and "source_hash" not in changes:
        fields["source_hash"] = KernelSpec(FAMILY, problem, here, config).hash
    return Record(**fields | changes)


def configs(count: int) -> list[Config]:
    """Legal ones of the problem's static key, the default first."""
    default = FAMILY.default(PROBLEM, HERE)
    others = (default.replace(**{knob.name: choice}) for knob in FAMILY.knobs for choice in knob.choices)
    legal = [c for c in dict.fromkeys([default, *others]) if not FAMILY.rejects(PROBLEM, HERE, c)]
    return legal[:count]


# ---- Python and C++ pick what dispatch picks ------------------------------------------------------------------------


def plan_of(records: list[Record], where: target.Target) -> Plan:
    rows = sorted(records, key=lambda r: (r.device != where.device, r.key, r.seconds))
    made = [
        PlannedRecord(
            r,
            r.device != where.device,
            tuple(size_point.features(r.problem, where.units).values()),
            size_point.regime(r.problem, where),
            Answer(True),
        )
        for r in rows
    ]
    return Plan(records[0].problem, where, tuple(made))


def size(draw: random.Random, mask: str) -> dict[str, int]:
    """Often one that repeats a round number, so that there are ties."""
    length = lambda: draw.choice([draw.randint(1, 70000), 2 ** draw.randint(0, 16)])  # noqa: E731
    heads = draw.choice([1, 2, 8, 32])
    fields = {
        "batch": draw.choice([1, 2, 4, draw.randint(1, 300)]), "heads": heads,
        "kv_heads": draw.choice([n for n in (1, 2, 8, 32) if heads % n == 0]),
        "seqlen_q": length(), "seqlen_k": length(),
    }  # fmt: skip
    if mask in ("window", "intervals"):
        fields |= {"window_left": draw.choice([-1, 0, draw.randint(0, 5000)]), "window_right": draw.choice([-1, 0, 7])}
    return fields


@pytest.mark.parametrize(
    ("mask", "where"), [(mask, H200) for mask in ("none", "causal", "window", "intervals")] + [("causal", HERE)]
)
def test_plans_pick_the_record_that_dispatch_picks(mask: str, where: target.Target, overlay: Path) -> None:
    draw = random.Random(f"plan/{mask}")
    static = Problem(mask=mask, intervals="both2" if mask == "intervals" else "")
    known = list({p.key: p for p in (static.replace(**size(draw, mask)) for _ in range(40))}.values())
    devices = [where.device] * 6 + ["another"]
    rows = [
        record(
            p,
            Config({"n": n}),
            where,
            device=draw.choice(devices),
            family=draw.choice(["sm90_forward", "other"]),
            source_hash="0" * 16,
        )  # fmt: skip
        for n, p in enumerate([*known, *known[:8]])
    ]
    merge.put(rows, overlay)
    database = store.Database.load([overlay])
    module = binding.load()
    regimes: set[tuple[bool, bool]] = set()
    for records in (database.records, [r for r in database.records if r.device != where.device]):
        plan = plan_of(records, where)
        words = plan.words(ours=True)
        device_only = store.Database()
        device_only._by_static = {(where.arch, static.static_key): sorted(records, key=lambda r: (r.key, r.seconds))}
        asked = [static.replace(**size(draw, mask)) for _ in range(1000)] + known
        for problem in asked:
            wanted = next((r for r, _ in device_only.candidates(problem, where)), None)
            regimes.add((size_point.has_few_rows(problem, where), wanted is None))
            p = problem
            sizes = [p.batch, p.heads, p.kv_heads, p.seqlen_q, p.seqlen_k, p.window_left, p.window_right]
            row, (index, _) = plan.nearest(problem), module.nearest(words, sizes)
            assert (row and row.record) == wanted, problem.key
            assert (plan.rows[index].record if index >= 0 else None) == wanted, problem.key
    assert {few for few, _ in regimes} == {True, False}


def test_the_plan_of_the_shipped_records_is_what_dispatch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without the GPU: rows of kernels that are not built, in the order of choose."""
    monkeypatch.setattr(store, "default_paths", lambda: (env.data_dir("tuning_db"),))
    monkeypatch.setattr(kernels, "loaded", lambda *args: None)
    draw = random.Random("shipped")
    static = Problem(mask="causal", heads=32, kv_heads=8)
    plan = resolve._make_plan(static, H200)
    assert len(plan.rows) > 5
    for _ in range(150):
        problem = static.replace(**size(draw, "causal"))
        row, choice = plan.nearest(problem), choose.choose(problem, H200)
        assert (row and row.record) == choice.record


def test_few_rows_are_served_by_records_of_few_rows(overlay: Path) -> None:
    """Others do not split keys; where there is none of few rows, the default serves, which does."""
    many = PROBLEM.replace(dtype="bf16", head_dim=128, window_left=-1, mask="causal", batch=8, heads=32, seqlen_q=2048)
    many = many.replace(kv_heads=8, seqlen_k=2048)
    few = many.replace(batch=1, heads=8, seqlen_q=16, seqlen_k=16384)
    family = families.get("sm90_forward")

    def winner(problem: Problem) -> Record:
        config = family.default(problem, H200)
        source = KernelSpec(family, problem, H200, config).hash
        return record(problem, config, H200, family=family.name, source_hash=source)

    merge.put([winner(many)], overlay)
    assert choose.choose(many.replace(seqlen_q=1000), H200).record is not None
    by_default = choose.choose(few, H200)
    assert (by_default.provenance, by_default.config["splits"]) == ("default", "keys")
    merge.put([winner(few)], overlay)
    assert choose.choose(few.replace(seqlen_k=10000), H200).record.problem == few
    assert choose.choose(many.replace(seqlen_q=1000), H200).record.problem == many
    assert not size_point.has_few_rows(few.replace(heads=32), HERE) and size_point.has_few_rows(few, HERE)


def test_a_default_depends_on_nothing_that_it_does_not_say() -> None:
    draw = random.Random("defaults")
    masks = ("none", "causal", "window")
    static = {
        "cpu_forward": ([Problem(dtype=d, head_dim=h) for d in ("fp32", "bf16") for h in (64, 256)], HERE),
        "sm80_forward": ([Problem(mask=m, head_dim=h) for m in ("none", "causal") for h in (64, 256)], H200),
        "sm90_forward": ([Problem(mask=m, head_dim=h) for m in masks for h in (64, 128, 256)], H200),
    }  # fmt: skip
    for name, (problems, where) in static.items():
        family = families.get(name)
        for problem in problems:
            seen: dict = {}
            for _ in range(60):
                sized = problem.replace(**size(draw, problem.mask))
                config = family.default(sized, where)
                assert seen.setdefault(family.default_reads(sized, where), config) == config, sized.key


# ---- calls ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Calls for which the table asked Python."""
    found: list[object] = []
    given = AttentionCall.of_op
    monkeypatch.setattr(AttentionCall, "of_op", lambda a, **own: found.append(a) or given(a, **own))
    return found


def tell_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel fills out with a number of its own: the tile_n of its config."""

    def loaded(spec):
        source = (
            '#include "fagen/abi/forward.h"\nextern "C" int fagen_launch(const fagen_forward_params* p, void*) {\n'
            f"  static_cast<float*>(p->o.data)[0] = {spec.config.tile_n};\n  return 0;\n}}\n"
            'extern "C" const char* fagen_error(int) { return ""; }\n'
            'extern "C" uint64_t fagen_workspace_bytes(const fagen_forward_params*) { return 0; }\n'
            + abi.layout_function("fagen/abi/forward.h")
        )
        from fagen.codegen import render
        from fagen.runtime import kernel

        artifact = cache.make(Job("tells", render.fold(source), ".cpp", (), (), "cpu"))
        return kernel.load(artifact, spec)

    monkeypatch.setattr(kernels, "loaded", loaded)
    monkeypatch.setattr(kernels, "built", loaded)


def test_a_new_size_gets_its_nearest_kernel_without_python(
    asked: list[object], monkeypatch: pytest.MonkeyPatch, overlay: Path
) -> None:
    tell_which(monkeypatch)
    default = FAMILY.default(PROBLEM, HERE)
    of = {n: default.replace(tile_n=n) for n in (64, 128, 256)}
    assert all(not FAMILY.rejects(PROBLEM, HERE, c) for c in of.values())
    merge.put([record(PROBLEM.replace(seqlen_q=s, seqlen_k=s), of[n]) for s, n in ((32, 64), (200, 128), (900, 256))])
    for length, layout in itertools.product((30, 31, 33, 150, 260, 700, 1000, 60, 200), ("bshd", "bhsd")):
        q = torch.zeros((1, length, 2, 16) if layout == "bshd" else (1, 2, length, 16))
        problem = PROBLEM.replace(seqlen_q=length, seqlen_k=length)
        out = fagen.attention(q, q, q, causal=True, layout=layout)
        choice = choose.choose(problem, HERE)
        assert choice.config is not None and out.flatten()[0].item() == choice.config.tile_n, length
    assert len(asked) == 2  # once a layout


def test_a_size_nearer_to_a_record_that_lost_to_pytorch_is_pytorchs(
    asked: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As choose says, in C++ and in Python: unless the LSE is wanted, or SDPA cannot be asked for the size."""
    near, far = configs(2)
    lost = {"torch_seconds": 5e-4}
    merge.put([record(PROBLEM.replace(seqlen_q=40, seqlen_k=40), near)])
    merge.put([record(PROBLEM.replace(seqlen_q=256, seqlen_k=256), far, **lost)])
    torched = []
    attend = fallback.attend
    monkeypatch.setattr(fallback, "attend", lambda *a, **k: torched.append(a[0].seqlen_q) or attend(*a, **k))
    warnings.simplefilter("error", fallback.FallbackWarning)  # it is no loss
    for length in (38, 44, 240, 250, 36, 260):
        attend_well(length)
    assert torched == [240, 250, 260] and len(asked) == 1
    q, k = torch.randn(1, 240, 2, 16), torch.randn(1, 250, 2, 16)
    out, lse = fagen.attention(k, k, k, causal=True, return_lse=True)
    assert right((out, lse), k, k, k, causal=True)
    out = fagen.attention(q, k, k, causal=True)
    assert right(out, q, k, k, causal=True)
    assert torched == [240, 250, 260]
    for length, keys, ours in itertools.product((36, 240, 250), (36, 240, 250), (False, True)):
        problem = PROBLEM.replace(seqlen_q=length, seqlen_k=keys)
        choice, served = choose.choose(problem, HERE, ours=ours), resolve.kernel_for(problem, HERE, ours=ours)
        assert (served.spec.config if served else None) == choice.config, problem.key


@pytest.mark.parametrize("other", [3e-4, 9e-4])
def test_what_beats_pytorch_serves_in_the_place_of_what_lost(other: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another family's record of the same size; here one that could not serve before it."""
    import dataclasses

    near, far = configs(2)
    second = dataclasses.replace(FAMILY, name="second")
    monkeypatch.setattr(families, "all_families", lambda: (FAMILY, second))
    beaten, better = record(PROBLEM, near, torch_seconds=5e-4), record(PROBLEM, far, seconds=other, family="second")
    rows = [PlannedRecord(r, False, (6.0, 0.0, 6.0), False, Answer(True, r)) for r in (beaten, better)]  # type: ignore[arg-type]
    made = resolve._where_torch_may(rows[0], rows[1:])
    assert made.where_torch_may == (Answer(True, better) if other < 5e-4 else Answer(True))  # type: ignore[arg-type]
    assert resolve._where_torch_may(rows[1], []) is rows[1]
    plan = Plan(PROBLEM, HERE, (made,))
    assert plan.find(PROBLEM, ours=True).kernel is beaten
    assert plan.find(PROBLEM, ours=False) == made.where_torch_may
    assert plan.find(PROBLEM.replace(seqlen_k=99), ours=False).kernel is beaten
    assert [Plan(p, HERE, ()).words(False)[2] for p in (PROBLEM, PROBLEM.replace(mask="none", window_right=-1))] == [
        2,
        1,
    ]
    assert Plan(PROBLEM.replace(softcap=True), HERE, ()).words(False)[2] == Plan(PROBLEM, HERE, ()).words(True)[2] == 0


def attend_well(length: int) -> None:
    q = torch.randn(1, length, 2, 16)
    out = fagen.attention(q, q, q, causal=True)
    assert right(out, q, q, q, causal=True)


# What a size may have wrong, for static facts that are known.
WRONG = [
    ("k must have shape", lambda c: setattr(c, "k", c.k[:1])),
    ("v must have shape", lambda c: setattr(c, "v", c.v[:, :-1])),
    ("v must have shape", lambda c: setattr(c, "v", c.v[:, :, :1])),
    ("must divide number of heads in query", lambda c: setattr(c, "q", c.q[:, :, :3])),
    ("intervals must have shape", lambda c: c.options.update(intervals=c.options["intervals"][:, :, :-1])),
    ("intervals must have shape", lambda c: c.options.update(intervals=c.options["intervals"].repeat(3, 1, 1, 1))),
    ("intervals must have shape", lambda c: c.options.update(intervals=c.options["intervals"].repeat(1, 3, 1, 1))),
    ("alibi_slopes must have shape", lambda c: c.options.update(alibi_slopes=torch.ones(2, 3))),
    ("alibi_slopes must have shape", lambda c: c.options.update(alibi_slopes=torch.ones(3, 4))),
    ("out must be torch.float32", lambda c: c.options.update(out=torch.empty(2, 32, 4, 16))),
    ("out must be torch.float32", lambda c: c.options.update(out=torch.empty(1, 33, 4, 16))),
]


@pytest.mark.parametrize(("words", "spoil"), WRONG)
def test_sizes_that_do_not_agree_are_refused_by_python(words: str, spoil, asked: list[object]) -> None:
    """By the ops themselves, which torch.compile calls: api.attention would find it before."""

    def ask(case: Case) -> torch.Tensor:
        o = case.options
        args = (
            case.q,
            case.k,
            case.v,
            o.get("intervals"),
            o.get("alibi_slopes"),
            False,
            False,
            -1,
            -1,
            0.0,
            None,
            False,
            0.0,
            None,
        )
        if "out" in o:
            return torch.ops.fagen.forward_out(*args, False, o["out"])
        return torch.ops.fagen.forward(*args)

    def fresh(**sizes: int) -> Case:
        case = example(**sizes)
        if "intervals" in words:
            rows = torch.full((1, 1, case.k.shape[1], 1), case.q.shape[1], dtype=torch.int32)
            case.options["intervals"] = rows
        if "alibi" in words:
            case.options["alibi_slopes"] = torch.ones(2, 4)
        if "out" in words:
            case.options["out"] = torch.empty_like(case.q)
        return case

    ask(fresh())
    ask(fresh(sq=34, sk=51))
    assert len(asked) == 1
    bad = fresh(sq=35, sk=52) if "out" not in words else fresh()
    spoil(bad)
    with pytest.raises(InvalidArgument, match=words):
        ask(bad)
    assert len(asked) == 2


@pytest.mark.parametrize("sizes", [{"sq": 0}, {"sk": 0}, {"b": 0}])
def test_nothing_to_compute_is_not_a_kernels(sizes: dict, asked: list[object]) -> None:
    case = example()
    fagen.attention(case.q, case.k, case.v)
    empty = example(**sizes)
    out = fagen.attention(empty.q, empty.k, empty.v)
    assert out.shape == empty.q.shape and (out == 0).all()
    assert len(asked) == 2


def test_a_window_as_wide_as_int32_is_right() -> None:
    case = example(window=(2**31 - 1, 3))
    assert case.check(*fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options))
    case = example(window=(2**31 - 1, 3), sq=40, sk=41)  # by the plan
    assert case.check(*fagen.attention(case.q, case.k, case.v, return_lse=True, **case.options))


def test_what_was_asked_before_forget_is_not_kept_after(asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may become ready while another thread is being told what serves until then."""
    words = python_ops._decide
    case = example()

    def forgets(*args, **named):
        found = words(*args, **named)
        binding.forget_table()
        return found

    monkeypatch.setattr(python_ops, "_decide", forgets)
    fagen.attention(case.q, case.k, case.v)
    fagen.attention(case.q, case.k, case.v)
    assert len(asked) == 2
    monkeypatch.setattr(python_ops, "_decide", words)
    for _ in range(3):
        fagen.attention(case.q, case.k, case.v)
    assert len(asked) == 3


def test_a_kernel_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sizes it serves, and by whatever road they come."""
    from fagen.codegen import render

    rendered = []
    fold = render.fold
    monkeypatch.setattr(render, "fold", lambda *args: rendered.append(args) or fold(*args))
    problem = PROBLEM.replace(seqlen_q=61)
    first = resolve.kernel_for(problem, HERE)
    count = len(rendered)
    assert first is not None
    for length in (62, 400, 50):
        assert resolve.kernel_for(problem.replace(seqlen_q=length, batch=length), HERE) is first
        q = torch.zeros(1, length, 2, 16)
        fagen.attention(q, q, q, causal=True)
    assert len(rendered) == count


def test_a_default_that_depends_on_sizes_asks_once_for_each_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    chosen = configs(2)
    short = lambda p, t: p.seqlen_k < 100  # noqa: E731
    family = dataclasses.replace(FAMILY, default=lambda p, t: chosen[short(p, t)], default_reads=short)
    monkeypatch.setattr(families, "all_families", lambda: (family,))
    decided = []
    original = choose.choose
    monkeypatch.setattr(choose, "choose", lambda *args, **named: decided.append(args[0]) or original(*args, **named))
    for length in (20, 400, 30, 500, 99, 100):
        found = resolve.kernel_for(PROBLEM.replace(seqlen_q=length, seqlen_k=length), HERE)
        assert found is not None and found.spec.config == chosen[length < 100]
        attend_well(length)
    assert len(decided) == 2


def test_a_kernel_that_cannot_be_built_is_tried_once(monkeypatch: pytest.MonkeyPatch, overlay: Path) -> None:
    """Not for every new size that it is the nearest to."""
    from fagen.errors import BuildError

    tried = []

    def fail(job, **named):
        tried.append(job)
        raise BuildError("cannot compile it", log="error")

    merge.put([record(PROBLEM.replace(batch=300), configs(9)[-1])])
    monkeypatch.setattr(cache, "find", lambda job: None)
    monkeypatch.setattr(cache, "make", fail)
    with pytest.warns(fallback.FallbackWarning, match="cannot compile it"):
        assert resolve.kernel_for(PROBLEM, HERE) is None
    assert resolve.kernel_for(PROBLEM.replace(seqlen_q=60), HERE) is None
    assert len(tried) == 1


def test_records_that_are_passed_over_are_not_judged_for_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = [record(PROBLEM.replace(seqlen_q=n, seqlen_k=n), configs(1)[0], source_hash="0" * 16) for n in (64, 70)]
    merge.put(stale)
    monkeypatch.setenv("FAGEN_STALE", "refuse")
    assert choose.choose(PROBLEM, HERE).provenance == "default"
    resolve.kernel_for(PROBLEM, HERE)
    monkeypatch.setattr(freshness, "check", lambda *args, **named: pytest.fail("judged again"))
    for length in (65, 66, 300):
        assert resolve.kernel_for(PROBLEM.replace(seqlen_q=length, seqlen_k=length), HERE) is not None


def test_distances_round_as_in_cpp() -> None:
    """One addition after the other: sum() of newer Pythons compensates."""
    one, other = PROBLEM.replace(seqlen_q=77, seqlen_k=1234), PROBLEM.replace(seqlen_q=4097, seqlen_k=99, batch=3)
    apart = list(forward.OP.differences(one, other, 132).values())
    assert forward.OP.distance(one, other, 132) == (apart[0] + apart[1]) + apart[2] and math.isfinite(sum(apart))
