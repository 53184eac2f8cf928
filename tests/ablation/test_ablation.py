"""fagen ablation: what a file may say, what becomes of each step on each machine, and whole runs on the CPU."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fagen import families, target
from fagen.ablation import plan, plot, report, run, spec
from fagen.build import toolchain
from fagen.cli import main
from fagen.codegen.spec import KernelSpec
from fagen.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick_machine")

GPU, AMPERE, HOST = target.known("sm_90"), target.known("sm_80"), target.host()
needs_cxx = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
TINY = "--target cpu --head-dim 16 --seqlen 64 --tokens 128 --hidden 32 --rounds 3 --min-time 0.01".split()
ROOT = Path(__file__).parents[2]
STORY = "fa1-fa2-fa3"


def told(gpu: bool = True) -> spec.Ablation:
    return spec.load(STORY, gpu=gpu)


def plans(gpu: target.Target, **sizes) -> dict[str, dict[str, plan.Plan]]:
    """By series and step, at one length."""
    ablation = told(gpu.is_gpu)
    return {
        spec.series(problem): {p.step: p for p in plan.plan(ablation, problem, gpu)}
        for problem in spec.problems(ablation, {"seqlen": "4k", **sizes})
    }


# ---- the story that ships -------------------------------------------------------------------------------------------


def test_the_problems_share_tokens_and_columns():
    problems = spec.problems(told(), {})
    assert len(problems) == len(set(problems)) == 24
    assert {p.batch * p.seqlen_q for p in problems} == {16384}
    assert {p.heads * p.head_dim for p in problems} == {2048}
    assert {(p.head_dim, p.mask) for p in problems} == {(d, m) for d in (64, 128) for m in ("none", "causal")}
    assert {p.seqlen_q for p in problems} == {512 << i for i in range(6)}


@pytest.mark.parametrize("tokens", ["512", "16k"])
def test_every_step_has_several_legal_configs_on_hopper(tokens):
    for series, steps in plans(GPU, seqlen=tokens).items():
        assert list(steps) == [step.name for step in told().steps]
        for name, p in steps.items():
            assert p.specs, f"{series} {name}: {p.reason}"
            assert len(p.specs) >= 3 or name == "tuned", f"{series} {name}"
            assert all(s.family.rejects(p.problem, GPU, s.config) is None for s in p.specs)


def test_the_steps_are_the_papers():
    steps = plans(GPU)["d128 causal"]

    def of(name: str, knob: str) -> set:
        return {spec.config[knob] for spec in steps[name].specs}

    for name, knob, value in (
        ("more-blocks", "loop_order", "kv_outer"), ("rows-outside", "loop_order", "q_outer"),
        ("rows-outside", "partition", "split_k"), ("split-rows", "partition", "split_q"),
        ("longest-first", "rescale", "each"), ("rescale-late", "rescale", "deferred"),
        ("split-rows", "block_order", "ascending"), ("longest-first", "block_order", "longest_first"),
        ("hopper", "ping_pong", False), ("ping-pong", "ping_pong", True), ("ping-pong", "overlap", False),
        ("overlap", "overlap", True), ("overlap", "schedule", "single"), ("blocks-stay", "schedule", "dynamic"),
        ("sections", "block_order", "sectioned"), ("copies-ahead", "rescale", "deferred"),
    ):  # fmt: skip
        assert of(name, knob) == {value}, f"{name} {knob}"
    assert {steps[n].problem.mask for n in steps} == {"none", "causal"}
    assert [n for n in steps if steps[n].problem.mask == "none"] == ["fa1"]
    assert [n for n in steps if steps[n].specs[0].family.name == "sm90_forward"] == list(steps)[8:]
    full = plans(GPU)["d128 full"]
    assert full["fa1"].key == full["skip-tiles"].key, "there is nothing to skip"
    assert full["longest-first"].key == full["split-rows"].key
    assert full["fa1"].key != full["more-blocks"].key
    assert {spec.config["schedule"] for spec in full["blocks-stay"].specs} == {"balanced"}


def test_one_block_a_head_is_the_same_kernel_but_for_its_grid():
    p = plans(GPU)["d64 full"]["fa1"]
    own = families.get("sm80_forward")
    texts = [KernelSpec(f, p.problem, GPU, p.specs[0].config).source.splitlines() for f in (own, p.specs[0].family)]
    normal, changed = (set(map(str.strip, text)) for text in texts)
    assert "#error" not in "\n".join(texts[1])
    assert sum("blocks_of_rows = wanted" in line for line in changed - normal) == 1
    assert len(changed - normal) == len(normal - changed) == 2, "that line, and the name in the first"
    assert p.specs[0].family not in families.all_families()


def test_a_gpu_without_wgmma_tells_the_rest_of_the_story():
    steps = plans(AMPERE)["d64 causal"]
    lacking = {name for name, p in steps.items() if not p.specs}
    assert lacking == {"hopper", "ping-pong", "overlap", "blocks-stay", "sections"}
    assert all("needs sm_90" in steps[name].reason for name in lacking)


def test_the_cpu_has_its_own_story():
    for simd in ("avx512", "avx2"):
        host = target.Target("cpu", "some", 8, simd=simd)
        for series, steps in plans(host, seqlen="512", tokens="512").items():
            for name, p in steps.items():
                assert p.specs, f"{simd} {series} {name}: {p.reason}"


def test_a_head_dim_without_tiles_is_told():
    steps = plans(GPU, head_dim="256")["d256 full"]
    assert steps["hopper"].reason == "the ablation has no tiles for head dim 256"
    assert steps["tuned"].specs


# ---- what a file may say --------------------------------------------------------------------------------------------

MINE = """
title = "mine"
[cpu]
dtype = "fp32"
head_dim = 16
mask = "none"
seqlen = 64
tokens = 64
hidden = 32
[[cpu.step]]
name = "one"
family = "cpu_forward"
config = { schedule = "blocked" }
"""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("name = ", "nmae = "), "it has no name"),
        (('schedule = "blocked"', 'shedule = "blocked"'), "no knob 'shedule'"),
        (('schedule = "blocked"', 'schedule = "sometimes"'), "is no choice"),
        (('"cpu_forward"', '"gpu_forward"'), "unknown family"),
        (('family = "cpu_forward"', ""), "names no family"),
        (("[[cpu.step]]", "[[gpu.step]]"), "no steps for a CPU"),
        (("tokens = 64", "token = 64"), "unknown key 'token'"),
        (("tokens = 64", ""), "does not say tokens"),
        (("tokens = 64", "tokens = 32"), "less than 64"),
        (("tokens = 64", "tokens = [64, 128]"), "2 sizes"),
        (('mask = "none"', 'mask = "window"'), "not studied"),
        (('name = "one"', 'name = "one"\nvariant = "nothing"'), "there is no template cpu/nothing.cpp.j2"),
        (('name = "one"', 'name = "one"\ntiles.fast = []'), "tiles of fast"),
        (('name = "one"', 'name = "one"\ntiles."²" = []'), "tiles of ²"),
        (('title = "mine"', "title = "), "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_with_mistakes_is_refused(tmp_path, capsys, change, says):
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    assert main.main(["ablation", str(path), "--target", "cpu", "--dry-run"]) == 0
    capsys.readouterr()
    path.write_text(MINE.replace(*change))
    assert main.main(["ablation", str(path), "--target", "cpu", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) <= 3


def test_settings_carry_on_until_a_family_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        MINE
        + """causal = { schedule = "longest" }
tiles.64 = [{ tile_m = 64 }]
[[cpu.step]]
name = "two"
config = { tile_n = 64 }
[[cpu.step]]
name = "three"
config = { schedule = "dynamic" }
[[cpu.step]]
name = "four"
family = "cpu_forward"
"""
    )
    one, two, three, four = spec.load(str(path), gpu=False).steps
    assert (two.config, two.causal) == ({"schedule": "blocked", "tile_n": 64}, {"schedule": "longest"})
    assert two.tiles == one.tiles != {}
    assert three.config["schedule"] == "dynamic"
    assert three.causal == {}, "what a step says holds under a mask as well"
    assert (four.config, four.causal, four.tiles) == ({}, {}, {})


def test_the_example_of_the_page(tmp_path):
    page = (ROOT / "docs" / "ablation.md").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(page.partition("```toml mine\n")[2].partition("```")[0])
    ablation = spec.load(str(path), gpu=True)
    for problem in spec.problems(ablation, {}):
        shared, registers = plan.plan(ablation, problem, GPU)
        assert {spec.config["q_source"] for spec in shared.specs} == {"shared"}
        assert {spec.config["q_source"] for spec in registers.specs} == {"registers"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nothing"], "fa1-fa2-fa3"),
        ([STORY, "--steps", "fa9"], "fa9"),
        ([STORY, "--out", "/nonexistent/x.json"], "no folder"),
        ([STORY, "--seqlen", "x"], "no size"),
        ([STORY, "--dtype", "fp64"], "fp64"),
    ],
    ids=str,
)
def test_wrong_usage(words, says, capsys):
    assert main.main(["ablation", "--target", "cpu", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


def test_the_list_and_the_dry_run(capsys):
    assert main.main(["ablation", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [STORY]
    assert main.main(["ablation", STORY, "--dry-run", "--target", "sm_80", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 24
    assert "needs sm_90 (wgmma), the target is sm_80" in err
    if not torch.cuda.is_available():
        assert main.main(["ablation", STORY, "--target", "sm_80"]) == 4
        assert "needs such a GPU" in capsys.readouterr().err


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_cxx
def test_a_run_end_to_end(tmp_path, capsys):
    files = {name: tmp_path / f"ablation.{name}" for name in ("json", "markdown", "csv")}
    words = [*TINY, "--json", *(w for n in ("markdown", "csv") for w in (f"--{n}", str(files[n])))]
    assert main.main(["ablation", STORY, *words, "--out", str(files["json"])]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result == json.loads(files["json"].read_text())
    assert result["complete"]
    names = [step["name"] for step in result["steps"]]
    assert names == [step.name for step in told(gpu=False).steps]
    assert [p["series"] for p in result["problems"]] == ["d16 full", "d16 causal"]
    full, causal = (p["steps"] for p in result["problems"])
    assert full["skip-tiles"] == {"outcome": "same", "same_as": "fa1", "tflops": full["fa1"]["tflops"]}
    assert causal["fa1"]["visits"] == "none"
    for problem in result["problems"]:
        before = None
        for name, facts in problem["steps"].items():
            if facts["outcome"] == "same":
                continue
            assert facts["outcome"] == "ok"
            assert facts["tflops"] == pytest.approx(problem["flops"] / facts["seconds"] / 1e12)
            assert facts["error_over_bound"] <= 1
            assert facts["verified"] == "all"
            family = families.get(facts["family"])
            assert family.config(facts["config"])
            assert facts.get("over") == before
            if before:
                assert facts["gain"] == pytest.approx(facts["tflops"] / problem["steps"][before]["tflops"])
            before = name
    assert causal["rows-outside"]["config"]["loop_order"] == "q_outer"
    assert result["summary"]["d16 causal"]["skip-tiles"]["gain"] == pytest.approx(causal["skip-tiles"]["gain"])
    assert "d16 causal, TFLOP/s" in err
    text = files["markdown"].read_text()
    assert "| fa1 | `cpu_forward` `loop_order=kv_outer`" in text
    assert "| skip-tiles | = |" in text
    assert str(tmp_path) not in text + result["command"]
    table = list(csv.DictReader(files["csv"].open()))
    assert [line["step"] for line in table] == 2 * names


@needs_cxx
def test_a_step_that_is_wrong_or_does_not_build_is_not_timed(tmp_path, capsys, monkeypatch):
    from fagen.build import cache
    from fagen.errors import BuildError
    from fagen.ops.attention import reference

    check, make, seen = reference.check, cache.build, []

    def wrong_once(*args, **options):
        seen.append(1)
        return (
            check(*args, **options) if len(seen) != 2 else reference.Verdict(False, 1.0, 9.0, "out: error 1, bound 0.1")
        )

    def fails(spec, **options):
        if spec.config["schedule"] == "dynamic" and spec.config["packing"] == "tile":
            raise BuildError("cannot compile it", "error: no such thing")
        return make(spec, **options)

    monkeypatch.setattr(reference, "check", wrong_once)
    monkeypatch.setattr(cache, "build", fails)
    words = ["--mask", "none", "--steps", "fa1,rows-outside,next-tile,tuned", "--json"]
    assert main.main(["ablation", STORY, *TINY, *words, "--out", str(tmp_path / "x.json")]) == 1
    out, err = capsys.readouterr()
    steps = json.loads(out)["problems"][0]["steps"]
    assert {name: facts["outcome"] for name, facts in steps.items()} == {
        "fa1": "ok", "rows-outside": "wrong", "next-tile": "failed", "tuned": "ok",
    }  # fmt: skip
    assert "seconds" not in steps["rows-outside"]
    assert steps["tuned"]["over"] == "fa1"
    assert "failed: next-tile: cannot compile it (everywhere)" in err
    assert "wrong: rows-outside: out: error 1, bound 0.1 (everywhere)" in err


@needs_cxx
def test_an_interrupted_run_shows_what_it_had(tmp_path, capsys, monkeypatch):
    one, seen = run._problem, []

    def interrupted(*args):
        seen.append(1)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return one(*args)

    monkeypatch.setattr(run, "_problem", interrupted)
    words = [*TINY, "--steps", "rows-outside,tuned", "--out", str(tmp_path / "x.json"), "--json"]
    assert main.main(["ablation", STORY, *words]) == 130
    out, err = capsys.readouterr()
    assert "interrupted after 1 of 2 problems" in err
    assert "d16 full, TFLOP/s" in err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "x.json").read_text())
    assert (len(result["problems"]), result["complete"]) == (1, False)


# ---- figures and the picture ----------------------------------------------------------------------------------------


def made(device: str = "NVIDIA H200") -> dict:
    """A result of the story on a Hopper GPU, with figures that no machine gave."""
    ablation, problems = told(), []
    for n, problem in enumerate(spec.problems(ablation, {})):
        steps: dict = {}
        for i, p in enumerate(plan.plan(ablation, problem, GPU)):
            speed = 10.0 * (i + 1) * (1 + n % 6)
            steps[p.step] = {"outcome": "ok", "tflops": speed, "seconds": problem.flops() / speed / 1e12}
        if problem.mask == "none":
            steps["skip-tiles"] = {"outcome": "same", "same_as": "fa1"}
        steps["ping-pong"] = {"outcome": "cannot", "reason": "it is elsewhere"}
        run.gains(steps)
        problems.append(
            {"series": spec.series(problem), "length": problem.seqlen_q, "key": problem.key, "steps": steps}
        )
    return {
        "title": ablation.title, "device": device, "steps": run.described(ablation), "problems": problems,
        "summary": run.summary(problems), "limit": {"what": "product", "samples": [{"tflops": 700.0, "gbps": 4000.0}]},
    }  # fmt: skip


def test_gains_are_over_the_nearest_step_that_has_a_figure():
    steps = made()["problems"][0]["steps"]
    assert (steps["more-blocks"]["gain"], steps["more-blocks"]["over"]) == (3.0, "fa1")
    assert steps["overlap"]["over"] == "hopper"
    assert "gain" not in steps["fa1"]
    assert "gain" not in steps["skip-tiles"]


def test_the_tables_have_a_line_a_step():
    result = made()
    text = report.markdown(result)
    for title in ("d64 full", "d64 causal", "d128 full", "d128 causal"):
        assert f"| {title}, TFLOP/s | 512 | 1k | 2k | 4k | 8k | 16k | gain | from | to |" in text
    assert "| more-blocks | 30.0 | 60.0 | 90.0 | 120 | 150 | 180 | 3.00x | 3.00x | 3.00x |" in text
    assert "cannot: ping-pong: it is elsewhere (everywhere)" in text
    assert len(list(csv.DictReader(report.as_csv(result).splitlines()))) == 24 * len(result["steps"])


def test_the_page_is_made_from_a_result():
    source = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(source)
    source.loader.exec_module(tables)
    kept = made() | {"environment": {"torch": "2.11", "driver": "580"}, "command": "fagen ablation fa1-fa2-fa3"}
    text = tables.measured_ablation(kept)
    assert "On an NVIDIA H200" in text
    assert "`fagen ablation fa1-fa2-fa3`" in text
    assert "| more-blocks | 3.00x | 1.50x | 3.00x | 1.50x |" in text


def test_a_kept_result_is_shown_once_more(tmp_path, capsys):
    kept = made() | {"format": run.FORMAT}
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps(kept))
    assert main.main(["ablation", "--show", str(path), "--markdown", str(tmp_path / "x.md"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == kept
    assert "d128 causal, TFLOP/s" in err
    assert (tmp_path / "x.md").read_text() == report.markdown(kept)
    assert main.main(["ablation", "--show", str(tmp_path / "x.md")]) == 2
    assert main.main(["ablation", STORY, "--show", str(path)]) == 2
    path.write_text(json.dumps({"format": run.FORMAT, "rows": []}))
    assert main.main(["ablation", "--show", str(path)]) == 2


def test_the_plot_has_a_panel_a_series(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib to draw with (pip install matplotlib)")
    plot.draw(made(), tmp_path / "ablation.svg")
    text = (tmp_path / "ablation.svg").read_text()
    for words in ("d64 full", "d128 causal", "ping-pong", "16k", "NVIDIA H200"):
        assert f"{words}<" in text
    result = made()
    result["problems"] = result["problems"][:6]  # a lone panel
    plot.draw(result, tmp_path / "one.svg")
    assert "d64 full<" in (tmp_path / "one.svg").read_text()


def test_a_file_that_is_not_there():
    with pytest.raises(UsageError, match="unknown"):
        spec.load("nothing.toml", gpu=True)
