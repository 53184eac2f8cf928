"""What the documents say holds: tables are current, links lead somewhere, commands parse, recipes work."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import shutil
import types
from pathlib import Path

import pytest

import fagen
from fagen import env, families, target
from fagen.build import toolchain
from fagen.cli import main
from fagen.codegen import render
from fagen.codegen.spec import KernelSpec
from fagen.errors import InvalidConfig
from fagen.ops.attention.problem import Problem

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> dict[str, str]:
    """The code blocks of a page that carry a name after their language, dedented."""
    pattern = r"^( *)```\w+ (\S+)\n(.*?)^ *```$"
    found = re.findall(pattern, path.read_text(), re.MULTILINE | re.DOTALL)
    return {title: re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, title, text in found}


def module(title: str) -> types.ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(title, ROOT / "docs" / f"{title}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_tables_are_current():
    for file, make in module("tables").PAGES.items():
        assert (ROOT / "docs" / file).read_text() == make(), f"docs/{file} is old; run: make docs"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert link.startswith("http") or (path.parent / link).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_parse(path):
    """Every `fagen ...` line of a code block, with the options it names."""
    text = path.read_text()
    code = re.findall(r"```(?:console|sh|bash)\n(.*?)```", text, re.DOTALL) + re.findall(
        r"(?:^    \S.*\n)+", text, re.MULTILINE
    )
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        words = line.strip().removeprefix("$ ")
        if not words.startswith("fagen "):
            continue
        words = shlex.split(re.split(r"   |#|\||&&|>", words)[0])[1:]
        if {"--help", "--version"} & set(words):
            continue
        parser = main._parser(words[0])
        parser.parse_args(words)  # exits where it does not parse


def test_the_readme_denies_no_knob():
    """What a family has, the limits do not say is missing."""
    limits = (ROOT / "README.md").read_text().partition("## Limits")[2].partition("\n## ")[0]
    for family in families.all_families():
        for knob in family.knobs:
            for word in knob.name.split("_"):
                assert not re.search(rf"\b(no|without)\s+(query\s+)?{word}s?\b", limits), knob.name
    assert not re.search(r"packs\s+no", limits)


def test_the_changelog_knows_the_version():
    assert f"## {fagen.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_the_readme_shows_what_explain_says():
    from fagen import explanation

    problem = Problem(dtype="fp32", head_dim=64, mask="causal", heads=8, kv_heads=2, seqlen_q=4096)
    report = explanation.explain_problem(problem, target.Target("cpu", "AMD EPYC", 2, simd="avx512"))
    text = (ROOT / "README.md").read_text()
    for line in str(report).splitlines():
        assert line.startswith("built") or line in text, line


def test_the_picture_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib to draw the tuning run with (pip install matplotlib)")
    picture = module("tune_picture")
    runs = picture.tried(ROOT / "benchmarks" / "h200_tune_trials.jsonl")
    chosen = {problem: rows for problem, rows in runs.items() if "q1024" in problem}
    picture.draw(chosen, tmp_path / "run.svg", "a run")
    drawn, shipped = (path.read_text() for path in (tmp_path / "run.svg", ROOT / "docs" / "img" / "tuning.svg"))
    for problem in chosen:
        assert problem.removeprefix("forward/") in drawn
        assert problem.removeprefix("forward/") in shipped


# ---- CONTRIBUTING: each recipe, followed --------------------------------------------------------------------------


RECIPES = blocks(ROOT / "CONTRIBUTING.md")


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """The recipe's family, in a copy of the templates and in the registry."""
    shutil.copytree(env.data_dir("templates"), tmp_path / "templates")
    for title, text in RECIPES.items():
        if title.startswith("templates/"):
            (tmp_path / title).write_text(text)
    original = env.data_dir
    monkeypatch.setattr(env, "data_dir", lambda kind: tmp_path / kind if kind == "templates" else original(kind))
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "cache"))
    render._environment.cache_clear()
    module = types.ModuleType("plain_forward")
    exec(RECIPES["fagen/families/plain_forward.py"], module.__dict__)
    everyone = (module.FAMILY, *families.all_families())
    monkeypatch.setattr(families, "all_families", lambda: everyone)
    yield module.FAMILY
    render._environment.cache_clear()


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_add_a_family(plain):
    from fagen.dispatch import choose
    from fagen.ops.attention import reference
    from fagen.ops.attention.inputs import make_inputs
    from fagen.runtime import kernel

    for words in ({"mask": "causal"}, {"mask": "window", "window_left": 5, "window_right": 2}):
        problem = Problem(
            dtype="fp32", head_dim=24, head_dim_v=40, heads=4, kv_heads=2, seqlen_q=37, seqlen_k=23, **words
        )
        choice = choose.choose(problem, target.host())
        assert choice.family is plain
        inputs = make_inputs(problem, target.host())
        kernel.get(KernelSpec(plain, problem, target.host(), choice.config)).launch(inputs.call, inputs.outputs)
        verdict = reference.check(inputs.call, inputs.outputs)
        assert verdict.ok, verdict.message
    assert plain.supports(problem.replace(dtype="bf16"), target.host()) == "dtype bf16: only fp32"
    assert choose.choose(problem.replace(dtype="bf16"), target.host()).family is not plain


def test_add_a_knob(plain):
    problem, host = Problem(dtype="fp32"), target.host()
    knob = eval(RECIPES["knob"].strip(), {"Knob": families.Knob})
    grown = dataclasses.replace(plain, knobs=(*plain.knobs, knob))
    with pytest.raises(InvalidConfig, match="lacks knob 'row_order'"):
        grown.config(plain.default(problem, host))
    config = grown.config({**plain.default(problem, host), "row_order": "descending"})
    text = KernelSpec(grown, problem, host, config).source
    assert "enum class RowOrder { ascending, descending };" in text
    assert "static constexpr RowOrder kRowOrder = RowOrder::descending;" in text
    assert grown.size() == 2 * plain.size()


def test_add_a_target(monkeypatch):
    rows = eval(RECIPES["target"].strip(), vars(target).copy())
    monkeypatch.setattr(target, "_GPUS", target._GPUS | rows)
    for arch in rows:
        new, problem = target.known(arch), Problem(mask="causal")
        able, reasons = families.candidates(problem, new)
        assert able, reasons
        text = KernelSpec(able[0], problem, new, able[0].default(problem, new)).source
        assert arch in text
