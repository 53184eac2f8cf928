"""The scripts that record spaces and compare the search: what they write, how they go on, what counts as a trial."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from fagen import families
from fagen.build import toolchain
from fagen.cli.main import main
from fagen.codegen.spec import KernelSpec
from fagen.families import Config
from fagen.ops.attention.problem import Problem
from fagen.report import export
from fagen.target import host, known
from fagen.tuner import recorded_space, search, simulate

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "benchmarks" / "spaces" / "h200_d64_causal.jsonl.xz"
PROBLEM = Problem(dtype="fp32", head_dim=16, mask="causal", heads=2, seqlen_q=64)
needs_cxx = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")


def script(name: str, monkeypatch):
    """By its name, which its workers import it by as well."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_reading_asks_for_the_default_of_a_space_once(monkeypatch):
    """Thousands of lines, each of which may lack a knob."""
    family, asked = families.get("sm90_forward"), []
    counting = dataclasses.replace(family, default=lambda *given: asked.append(given) or family.default(*given))
    monkeypatch.setattr(recorded_space.families, "get", lambda name: counting)
    (space,) = recorded_space.read(SPACE)
    assert len(space.entries) > 100 and len(asked) == 1


@pytest.fixture
def recorder(monkeypatch):
    return script("record_spaces", monkeypatch)


@pytest.fixture
def peers(monkeypatch):
    return script("search_peers", monkeypatch)


# ---- recording -------------------------------------------------------------------------------------------------------


def small(recorder, problem=PROBLEM, count=3):
    """The default and a few others."""
    whole = recorder.plan((problem, host(), count))
    return whole if len(whole.configs) <= count else dataclasses.replace(whole, configs=whole.configs[:count])


@needs_cxx
def test_a_unit_of_several_kernels_is_each_of_them(recorder, tmp_path):
    """Each is right, has facts of its own, and one that does not compile takes no other with it."""
    configs = recorder.plan((PROBLEM, host(), 2)).configs
    items = [
        KernelSpec(families.get("cpu_forward"), PROBLEM, host(), config)
        for config in dict.fromkeys((configs[0], configs[-1]))
    ]
    built = recorder.compile_unit(recorder.Unit(tuple(items), str(tmp_path)))
    assert [(b.item, b.outcome, b.place) for b in built] == [(items[0], "ok", 0), (items[1], "ok", 1)]
    assert built[0].library == built[1].library
    default = recorder.measure_one(recorder.Timed(built[0]))
    assert default["outcome"] == "ok" and default["samples"] >= 9
    other = recorder.measure_one(recorder.Timed(built[1], built[0], 123.0))
    assert other["outcome"] == "ok" and other["seconds"] > 1, "told in seconds of the default, which took 123 s once"


def test_what_does_not_compile_takes_no_other_with_it(recorder, tmp_path, monkeypatch):
    def compiler(jobs, folder):
        bad = any("kTileM = 32" in job.source for job in jobs)
        return recorder.subprocess.CompletedProcess([], int(bad), "", "error: tile")

    monkeypatch.setattr(recorder, "_run_compiler", compiler)
    space = recorder.enumerate_space(families.get("cpu_forward"), PROBLEM, host())
    bad, good = (next(c for c in space.legal if (c.tile_m == 32) is small) for small in (True, False))
    items = tuple(KernelSpec(families.get("cpu_forward"), PROBLEM, host(), config) for config in (bad, good))
    built = recorder.compile_unit(recorder.Unit(items, str(tmp_path)))
    assert {b.item.config: b.outcome for b in built} == {bad: "compile", good: "ok"}
    assert "error: tile" in built[0].facts["reason"]


def test_sources_are_joined_and_told_apart(recorder):
    family, problem, target = families.get("sm90_forward"), Problem(head_dim=64, seqlen_q=512), known("sm_90")
    default = family.default(problem, target)
    text = recorder.join([KernelSpec(family, problem, target, c).source for c in (default, default.replace(tile_n=48))])
    assert text.count("#include <cuda.h>") == 1 and text.index("#include") < text.index("namespace candidate_0_")
    for place in (0, 1):
        assert text.count(f"int fagen_launch_{place}(") == text.count(f"fagen_error_{place}(") == 1
    assert "fagen_launch(" not in text
    log = (
        "ptxas info : Compiling entry function '_ZN12candidate_1_14forward_kernelE' for 'sm_90a'\n"
        "    0 bytes stack frame, 96 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info : Used 168 registers\n"
        "ptxas info : Compiling entry function '_ZN12candidate_0_14forward_kernelE' for 'sm_90a'\n"
        "ptxas info : Used 90 registers\n"
    )
    facts = [recorder.compiler.parse_ptxas(part) for part in recorder._logs(log, 2)]
    assert facts[0]["functions"] == {"forward_kernel": {"registers": 90, "smem_bytes": 0}}
    assert facts[1]["registers"] == 168 and facts[1]["spill_bytes"] == 104


@needs_cxx
def test_a_recording_goes_on_in_another_folder(recorder, tmp_path, capsys):
    """Twice with room for a part each: every config once, none lost to a torn line, and the record is read."""
    whole = small(recorder)
    (tmp_path / "one").mkdir()
    first = recorder.File(whole, tmp_path / "one", None)
    recorder.Recorder([first], 1, math.inf, str(tmp_path)).run()
    assert set(first.done) == set(whole.configs)
    lines = first.path.read_text().splitlines(keepends=True)
    first.path.write_text("".join(lines[:-1]) + lines[-1][:9])  # its process was killed while it wrote
    (tmp_path / "two").mkdir()
    again = recorder.File(whole, tmp_path / "two", tmp_path / "one")
    assert len(again.done) == len(whole.configs) - 1
    recorder.Recorder([again], 1, math.inf, str(tmp_path)).run()
    assert len(again.path.read_text().splitlines()) == len(lines)
    recorder.pack(tmp_path / "two", tmp_path)
    assert f"{len(whole.configs)} of {whole.legal} configs" in capsys.readouterr().err
    (space,) = recorded_space.read(tmp_path / f"{again.path.name}.xz")
    assert set(space.entries) == set(whole.configs) and not space.complete
    assert {e.outcome for e in space.entries.values()} == {"ok"}
    assert {c for c, e in space.entries.items() if e.drawn} == whole.drawn & set(whole.configs)
    assert space.head["sampled"] == len(whole.drawn)
    assert simulate.replay(space, "guided", 0, workers=2).hits[0.02] is not None


def test_files_of_other_sources_or_devices_are_refused(recorder, tmp_path):
    whole = small(recorder)
    file = recorder.File(whole, tmp_path, None)
    for name, value in (("sources", "others"), ("target", {"arch": "sm_90"})):
        head = json.loads(file.path.read_text())
        (tmp_path / name).mkdir()
        (tmp_path / name / file.path.name).write_text(json.dumps(head | {name: value}) + "\n")
        with pytest.raises(SystemExit, match=f"another {name}"):
            recorder.File(whole, tmp_path / name, None)


def test_the_first_problems_come_first_and_in_turns(recorder, tmp_path):
    files = []
    for length in range(64, 70):
        whole = recorder.plan((PROBLEM.replace(seqlen_q=length, seqlen_k=length), host(), 200))
        files.append(recorder.File(whole, tmp_path, None))
    found = list(recorder.order(files))
    assert len(found) == len(set(found)) == sum(len(file.plan.configs) for file in files)
    assert [config for _, config in found[:6]] == [file.default for file in files]
    turns = [files.index(file) for file, _ in found[6:]]
    assert max(turns[: sum(len(file.plan.configs) - 1 for file in files[: recorder.FIRST])]) == recorder.FIRST - 1
    assert [n for i, n in enumerate(turns) if i == 0 or turns[i - 1] != n][:8] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_recorded_problems_are_what_they_are_meant_to_be(recorder):
    from fagen.cli import arguments

    problems = arguments.problems_in(ROOT / "benchmarks" / "problems" / "spaces.toml", known("sm_90"))
    first = problems[: recorder.FIRST]
    assert {"none", "causal", "window"} == {p.mask for p in first} and {64, 128, 256} == {p.head_dim for p in first}
    assert any(p.head_dim == 64 and p.seqlen_q <= 512 for p in first)
    names = [recorder.Plan(p, known("sm_90"), "sm90_forward", 0, (), frozenset()).name for p in problems]
    assert len(set(names)) == len(names) <= 8 and names[0] == "h200_d128_full_4096_sample"


# ---- comparing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space():
    return recorded_space.read(SPACE)[0]


@pytest.mark.parametrize(
    "name", ["guided", "guided-cold", "guided-ahead", "guesses-3", "cost-alone", "no-cost", "random"]
)
def test_every_method_tries_each_config_once(peers, space, name, monkeypatch):
    monkeypatch.setattr(peers, "TRIALS", 24)
    one, again, other = (peers.METHODS[name](space, seed) for seed in (1, 1, 2))
    assert len(one) == len(set(one)) == 24 and set(one) <= set(space.entries)
    assert list(one) == list(again)
    ties_alone = name in ("cost-alone", "guided-ahead")  # only they are chance there, in what comes first
    assert list(one) != list(other) or ties_alone
    if name == "guided":
        assert one[0] == space.family.default(space.problem, space.target)


def test_scores(peers):
    configs = [Config({"a": n}) for n in range(5)]
    entries = dict(
        zip(
            configs,
            (recorded_space.RecordedTrial("ok" if s else "spill", s, 0, 1, 1) for s in (2, None, 1.5, 1.015, 1)),
            strict=True,
        )
    )
    whole = recorded_space.Recorded({}, PROBLEM, host(), entries)
    found = peers.score(whole, configs[:4])
    assert (found["2%"], found["1%"], found["trials"]) == (4, None, 4)
    assert found["regret"] == pytest.approx([0.015] * 4)
    assert peers.score(whole, configs)["1%"] == 5
    failed = peers.summary([peers.score(whole, configs[1:2]), peers.score(whole, configs)])
    assert failed["1%"] == {"median": 5, "p90": None, "missed": 1, "mean": (161 + 5) / 2}
    assert failed["regret 20"] == {"median": 0.0, "p90": None}
    assert [peers.quantile(range(1, 11), q) for q in (0.5, 0.9, 1)] == [5, 9, 10]


def test_the_comparison_goes_on_from_what_it_kept(peers, space, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(peers, "METHODS", {"random": lambda s, seed: calls.append(seed) or peers.by_chance(s, seed)})
    first = peers.measure("random", space, 3, tmp_path)
    assert peers.measure("random", space, 5, tmp_path)[:3] == first and calls == [0, 1, 2, 3, 4]
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["x", str(SPACE), "--seeds", "4", "--raw", str(tmp_path), "--out", str(out)])
    peers.main()
    result = json.loads(out.read_text())
    assert calls == [0, 1, 2, 3, 4], "no seed is run twice"
    assert result["spaces"][0]["configs"] == 447 and result["pooled"]["restricted"]["random"]["runs"] == 4
    assert "random" in capsys.readouterr().err


def test_what_was_not_drawn_is_no_part_of_a_cold_search(space, monkeypatch):
    planted = space.family.default(space.problem, space.target)
    sampled = dataclasses.replace(
        space, entries={c: dataclasses.replace(e, drawn=c != planted) for c, e in space.entries.items()}
    )
    assert planted not in simulate.replay(sampled, "guided", 0, workers=1, trials=40, cold=True).tried
    assert simulate.replay(sampled, "guided", 0, workers=1, trials=5).tried[0] == planted


def test_a_cost_model_leaves_one_guess(space):
    family, where = space.family, (space.problem, space.target)
    assert search.guesses(family, *where) == [family.default(*where)]
    everything = search.guesses(family, *where, "tpe")
    assert (
        everything == list(dict.fromkeys([family.default(*where), *family.first_configs(*where)]))
        and len(everything) > 9
    )
    assert search.guesses(dataclasses.replace(family, cost=None), *where) == everything


def test_ties_are_chance_whatever_the_order_of_the_record(space):
    """A model that knows nothing proposes any of a space's configs."""
    from fagen.tuner.model import Model

    configs = list(space.entries)
    assert len({Model(configs, None, seed).propose() for seed in range(8)}) >= 6
    assert Model(configs, None, 3).propose() == Model(configs, None, 3).propose()


# ---- Kernel Tuner ----------------------------------------------------------------------------------------------------


def test_a_space_as_a_cache_of_kernel_tuner(space, tmp_path, capsys):
    out = tmp_path / "cache.json"
    assert main(["db", "export", "--format", "kernel_tuner", "--space", str(SPACE), "--out", str(out)]) == 0
    cache = json.loads(out.read_text())
    knobs = [knob.name for knob in space.family.knobs]
    assert cache["tune_params_keys"] == knobs == list(cache["tune_params"]) and len(cache["cache"]) == 447
    for config, entry in space.entries.items():
        found = cache["cache"][",".join(str(config[name]) for name in knobs)]
        assert {name: found[name] for name in knobs} == dict(config)
        assert all(config[name] in cache["tune_params"][name] for name in knobs)
        if entry.seconds:
            assert found["time"] == pytest.approx(entry.seconds * 1e3) and "__error__" not in found
        else:
            assert found["__error__"] == "CompilationFailedConfig" and "time" not in found
    for words in (["--format", "kernel_tuner"], ["--format", "csv", "--space", str(SPACE)]):
        assert main(["db", "export", *words]) == 2
        assert "--space goes with" in capsys.readouterr().err


def test_kernel_tuner_replays_the_space(peers, space):
    """What it is told is what was recorded, and it asks for 160 different configs."""
    pytest.importorskip("kernel_tuner")
    for name in ("hybrid_vndx", "adaptive_tabu_greywolf"):
        tried = peers.kernel_tuner(space, 0, name)
        assert len(tried) == len(set(tried)) == peers.TRIALS and set(tried) <= set(space.entries)
    assert export.kernel_tuner(space)
