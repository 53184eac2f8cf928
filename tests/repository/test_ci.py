"""What others run for us (hooks before a commit, the workflow, issue templates) is what anybody runs by hand."""

from __future__ import annotations

import os
import re
import subprocess
import types
from pathlib import Path

import pytest

from fagen.cli import main
from tests import conftest

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
HOOKS = ROOT / ".pre-commit-config.yaml"
BARE = {"PATH": os.environ["PATH"]}  # a make around us hands its flags on, otherwise
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))


def recipe(*targets: str) -> list[str]:
    """The commands of a target, as make would run them where an environment is there already."""
    command = ["make", "--dry-run", "--always-make", "PYTHON=python3", *targets]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=BARE)
    return done.stdout.splitlines()


def test_the_workflow_runs_what_anybody_runs():
    text = WORKFLOW.read_text()
    ran = re.findall(r"^\s*- run: (.*)$", text, re.MULTILINE)
    assert ran == ["make check", ".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")
    assert "secrets" not in text and "\t" not in text
    assert "make test" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", [WORKFLOW, HOOKS], ids=lambda path: path.name)
def test_they_parse(path):
    yaml = pytest.importorskip("yaml", reason="no PyYAML, which is needed for this test alone")
    told = yaml.safe_load(path.read_text())
    if path == HOOKS:
        assert [hook["language"] for repo in told["repos"] for hook in repo["hooks"]] == ["system"] * 4
    else:
        steps = told["jobs"]["test"]["steps"]
        assert [step.get("run", step.get("uses", "").partition("@")[0]) for step in steps] == [
            "actions/checkout", "actions/setup-python", "make check", ".ci/run",
        ]  # fmt: skip


def test_what_the_hooks_run_is_a_part_of_make_check():
    entries = re.findall(r"^\s*entry: make (.*)$", HOOKS.read_text(), re.MULTILINE)
    assert len(entries) == HOOKS.read_text().count("- id: ") == 4
    whole = recipe("check")
    for entry in entries:
        commands = recipe(entry)
        assert commands and all(command in whole for command in commands), entry
    for tool in ("ruff format --check", "ruff check", "mypy", "clang-format"):
        assert any(tool in command for command in whole), tool


def test_quick_is_a_part_of_test():
    (quick,) = (line for line in recipe("quick") if "-m pytest" in line)
    assert "-m 'not slow and not gpu and not thorough'" in quick
    (without,) = (line for line in recipe("test", "GPU=") if "-m pytest" in line)
    assert "slow" not in without and "tests/gpu" not in without


def test_the_gpus_tests_run_alone_and_whatever_failed_before(tmp_path):
    """Through a Python that writes down what it is asked for."""
    python, said = tmp_path / "python3", tmp_path / "said"
    for first, second, fine in ((0, 0, True), (0, 5, True), (1, 0, False), (0, 1, False), (1, 5, False)):
        said.write_text("")
        python.write_text(
            f'#!/bin/sh\n[ "$1" = -c ] && exit\necho "$@" >> {said}\n'
            f'case "$*" in *--ignore*) exit {first} ;; esac\nexit {second}\n'
        )
        python.chmod(0o755)
        done = subprocess.run(["make", "test", "GPU=yes", f"PYTHON={python}"], cwd=ROOT, env=BARE, capture_output=True)
        assert (done.returncode == 0) == fine, (first, second)
        both = ["-m pytest -n auto --dist loadgroup --ignore=tests/gpu", "-m pytest tests/gpu"]
        assert said.read_text().splitlines() == both


def test_a_tests_time_out_grows_with_the_load(monkeypatch):
    def given(option: float | None) -> float:
        config = types.SimpleNamespace(option=types.SimpleNamespace(timeout=option))
        conftest.pytest_configure(config)
        return config.option.timeout

    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 9.0, 9.0))
    monkeypatch.delenv("FAGEN_TEST_TIMEOUT", raising=False)
    assert given(None) == conftest.TIMEOUT
    monkeypatch.setattr(os, "getloadavg", lambda: (8.0, 0.0, 0.0))
    assert given(None) == 4 * conftest.TIMEOUT
    monkeypatch.setenv("FAGEN_TEST_TIMEOUT", "10")
    assert given(None) == 40
    assert given(5.0) == 5.0, "--timeout is what it says"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_name_commands_that_are_there(path):
    text = path.read_text()
    assert text.startswith("---\nname: ") and "\nabout: " in text
    for verb, flags in re.findall(r"(?:^|`)fagen ([a-z]+)([^`\n]*)", text, re.MULTILINE):
        assert verb in main.VERBS
        with pytest.raises(SystemExit) as end:
            main.main([verb, *flags.split(), "--help"])
        assert end.value.code == 0
    assert len(TEMPLATES) == 3
    assert {p.stem: re.findall(r"fagen (?:doctor|bench)", p.read_text())[:1] for p in TEMPLATES} == {
        "bug": ["fagen doctor"], "performance": ["fagen bench"], "feature": [],
    }  # fmt: skip
