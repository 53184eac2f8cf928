"""The examples run, and show what they say they show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fagen.build import toolchain
from tests.repository.test_docs import blocks

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")


def command_of(program: Path, compiler: str) -> list[str]:
    """The compiler's command that stands at the head of an example."""
    (command,) = re.findall(rf"^//   ({re.escape(compiler)} .*)$", program.read_text(), re.MULTILINE)
    return [str(ROOT / word) if (ROOT / word).exists() else word for word in command.split()]


@pytest.fixture
def run(tmp_path):
    """A command in a folder of its own, with a database of its own, `fagen` among the commands; what it printed."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "fagen"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fagen "$@"\n')
    script.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "FAGEN_DB_DIR": str(tmp_path / "db"), "XDG_STATE_HOME": str(tmp_path / "state"), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip

    def run(*command: object, **more: str) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_every_example_is_listed_and_run_here():
    listed = set(re.findall(r"\]\(([^).][^)]*)\)", (EXAMPLES / "README.md").read_text()))
    there = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("*") if path.is_file()}
    assert listed == there - {"README.md"} | {"add_a_family/run.py", "solve/README.md"}
    for name in listed:
        assert Path(name).name in Path(__file__).read_text(), name


def test_call(run):
    said = run(sys.executable, EXAMPLES / "call.py")
    assert "as if it were alone" in said
    assert "picked   cpu_forward" in said


_TRAININGS = [("--steps=300",), ("--steps=60", "--packed", "--deterministic"), ("--steps=60", "--dropout=0.1")]
_IN_TURN = """import runpy, sys
for words in %r:
    sys.argv[1:] = words
    print("next:", flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")"""


@pytest.mark.slow
def test_train(run):
    """In one process, whose start takes longer than most of them."""
    code = f"import sys; sys.argv[0] = {str(EXAMPLES / 'train.py')!r}\n{_IN_TURN % (_TRAININGS,)}"
    said = run(sys.executable, "-c", code, OMP_NUM_THREADS="1")
    assert "PyTorch computes" not in said
    for flags, text in zip(_TRAININGS, said.split("next:\n")[1:], strict=True):
        steps = int(flags[0].removeprefix("--steps="))
        assert abs(float(re.search(r"([+-][\d.]+)%", text)[1])) < (5.0 if "--dropout=0.1" in flags else 2.0)
        first, last = (float(re.findall(rf"^ *{step} +([\d.]+)", text, re.MULTILINE)[0]) for step in (0, steps - 1))
        assert last < (0.4 if steps == 300 else 0.7) * first
        assert ("two runs agree in every bit: True" in text) == ("--deterministic" in flags)


@pytest.mark.slow
def test_serve(run):
    said = run(sys.executable, EXAMPLES / "serve.py", "--requests=12")
    assert "all tokens are those of a plain loop" in said and "PyTorch computes" not in said
    assert int(re.search(r"up to (\d+) requests together", said)[1]) > 3


@pytest.mark.slow
def test_tune_one_shape(run, tmp_path):
    said = run("sh", EXAMPLES / "tune_one_shape.sh", TRIALS="2")
    assert "picked   cpu_forward (exact" in said
    assert json.loads((tmp_path / "winner" / "manifest.json").read_text())["provenance"].startswith("tuned on")


@pytest.mark.slow
def test_tune_one_shape_from_python(run, tmp_path):
    said = run(sys.executable, EXAMPLES / "tune_one_shape.py", TRIALS="2")
    assert re.search(r"^forward/fp32/d64/causal/b1/h4-4/q256-k256: .*the default", said, re.MULTILINE)
    assert "picked   cpu_forward (exact" in said
    assert "out (1, 256, 4, 64)" in said
    assert [path for path in (tmp_path / "db").rglob("*") if path.is_file()], "the winner is in the database"


@pytest.mark.parametrize(("name", "says"), [("emitted.cpp", "right: error"), ("decode_loop.cpp", "right: 120 tokens")])
def test_an_emitted_kernel_runs_without_python(run, name, says):
    run(str(toolchain.require_cxx()), "-Wall", "-Werror", *command_of(EXAMPLES / name, "g++")[1:])
    assert run(f"./{Path(name).stem}").startswith(says)


@pytest.mark.slow
def test_the_decode_loop_fails_a_kernel_or_a_loop_that_does_something_else(run, tmp_path):
    text, kernel = (EXAMPLES / "decode_loop.cpp").read_text(), ROOT / "generated" / "cpu-bf16-d128-decode-page16"
    compiler = (str(toolchain.require_cxx()), "-std=c++17", "-O1", "-march=native", "-fopenmp")
    run(*compiler, "-c", kernel / "kernel.cpp")
    for there, instead in (
        ("p.scale = 1 /", "p.scale = 2 /"),
        ("page = used++;", "page = 0;"),  # which all sequences write
        ("tokens[b] = largest(model.logits(o, value));", "tokens[b] = 7;"),
    ):
        assert there in text
        (tmp_path / "wrong.cpp").write_text(text.replace(there, instead))
        run(*compiler, f"-I{kernel}", f"-I{EXAMPLES}", "-o", "wrong", "wrong.cpp", "kernel.o")
        assert run("sh", "-c", "./wrong || exit 0").startswith("WRONG"), there


@pytest.mark.thorough
@pytest.mark.nvcc
def test_the_decode_loop_compiles_for_a_gpu(run):
    run(str(toolchain.require_nvcc()), *command_of(EXAMPLES / "decode_loop.cpp", "nvcc")[1:])


def test_solve_is_right_on_the_cpu(run, tmp_path):
    """All corners of its domain, and some of the rest, against float64; by kernels that were emitted."""
    run(sys.executable, EXAMPLES / "solve" / "build.py", "--target", "cpu", "--out", tmp_path / "solve")
    said = run(tmp_path / "solve" / "solve", "check", 10)
    assert re.search(r"^right: (\d+) of \1 calls", said, re.MULTILINE), said
    assert "faster" in run(tmp_path / "solve" / "solve", "time", 64, 64, 4)


@pytest.mark.thorough
@pytest.mark.nvcc
def test_solve_compiles_for_a_gpu(run, tmp_path):
    """Two kernels in one program: where there is no GPU it cannot run."""
    words = ("--target", "sm_90", "--sizes", 64, "--out", tmp_path / "solve")
    assert "2 kernels" in run(sys.executable, EXAMPLES / "solve" / "build.py", *words)


def test_the_family_is_the_one_that_contributing_shows():
    shown = {Path(title).name: text for title, text in blocks(ROOT / "CONTRIBUTING.md").items() if "/" in title}
    there = {path.name: path.read_text() for path in (EXAMPLES / "add_a_family").iterdir() if path.is_file()}
    there.pop("run.py")
    assert shown == there


@pytest.mark.slow
def test_add_a_family(run):
    said = run(sys.executable, EXAMPLES / "add_a_family" / "run.py")
    assert "picked   plain_forward" in said
    assert "right: largest error" in said
    assert not list((ROOT / "fagen").rglob("plain*"))
    assert not list((ROOT / "templates").rglob("plain*"))


_CELLS = """import json, sys
names = {}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
open("picture.html", "w").write(names["picture"]._repr_html_())"""


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(run, tmp_path):
    notebook = json.loads((EXAMPLES / "tuning.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell.get("outputs", []) == [], "outputs are of another machine: clear them"
    shorter = (EXAMPLES / "tuning.ipynb").read_text().replace('\\"8\\"', '\\"3\\"')
    (tmp_path / "tuning.ipynb").write_text(shorter)
    said = run(sys.executable, "-c", _CELLS, tmp_path / "tuning.ipynb")
    assert "picked   cpu_forward (exact" in said
    assert re.search(r"winner +\d", said)
    assert "<circle" in (tmp_path / "picture.html").read_text()
