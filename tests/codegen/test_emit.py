"""Emitted kernels stand alone: their examples are built with one compiler call and run, and a wrong kernel shows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fagen.build import toolchain
from fagen.cli import main
from fagen.cli.arguments import expand
from fagen.cli.commands.emit import choose
from fagen.codegen import emit
from fagen.errors import FagenError, InvalidConfig, UnsupportedProblem, UsageError
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.target import known
from fagen.tuner.evaluate import SPILL_TOLERANCE
from tests.support.thorough import sample

SMALL = "--seqlen 96 --batch 2 --heads 4 --kv-heads 2"
needs_cxx = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(toolchain.nvcc() is None, reason="no nvcc")


def run_emit(folder: Path, words: str) -> dict:
    assert main.main(["emit", "--out", str(folder), *shlex.split(words)]) == 0
    return json.loads((folder / emit.MANIFEST).read_text())


def make(folder: Path, command: str) -> None:
    done = subprocess.run(shlex.split(command), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_cxx
@pytest.mark.parametrize(
    "words",
    [
        "--dtype fp32 --head-dim 64 --mask causal " + SMALL,
        "--dtype bf16 --head-dim 72-40 --interval-kind both4 " + SMALL,
        "--dtype fp32 --head-dim 32 --mask causal --dropout " + SMALL,
        "--dtype fp32 --head-dim 20 --window 9,3 --softcap --alibi --seqlen-q 33 --seqlen-k 70 --heads 2",
        "--op backward --dtype fp32 --head-dim 64 --mask causal " + SMALL,
        "--op backward --dtype bf16 --head-dim 72-40 --interval-kind both4 " + SMALL,
        "--op backward --dtype fp32 --head-dim 20 --window 9,3 --softcap --alibi --dropout --seqlen-q 33 --seqlen-k 70",
        "--op decode --dtype bf16 --head-dim 72-40 --page 16 --mask causal --sinks --seqlen-q 5 --seqlen-k 99",
        "--op decode --dtype fp16 --head-dim 64 --kv-dtype fp8_e4m3 --window 60,2 --softcap " + SMALL,
        pytest.param("--op decode --dtype fp32 --head-dim 48-32 --shared-kv " + SMALL, marks=pytest.mark.thorough),
    ],
)
def test_the_example_is_built_by_its_own_command_and_is_right(tmp_path, words):
    manifest = run_emit(tmp_path, f"--target cpu --config default --example {words}")
    make(tmp_path, manifest["example"])
    done = subprocess.run([tmp_path / "example"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right: largest error" in done.stdout
    assert " ms" in done.stdout


@needs_cxx
@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("p.scale = 1.f", "p.scale = 1.1f"),  # another computation
        ("tensor(upload(in.k), kKeys", "tensor(upload(in.q), kKeys"),  # other inputs
        ("p.window_right = kRight", "p.window_right = kRight + 1"),  # another mask
        ("p.lse = lse;", "p.lse = nullptr;"),  # left unwritten: still NaN
    ],
)
def test_the_example_fails_a_kernel_that_computes_something_else(tmp_path, there, instead):
    manifest = run_emit(
        tmp_path, f"--target cpu --config default --example --dtype fp32 --head-dim 16 --window 40,3 {SMALL}"
    )
    text = (tmp_path / "main.cpp").read_text()
    assert there in text
    (tmp_path / "main.cpp").write_text(text.replace(there, instead))
    make(tmp_path, manifest["example"].replace("-O3", "-O1"))
    done = subprocess.run([tmp_path / "example"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "WRONG" in done.stdout


@needs_cxx
@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("p.scale = 1.f", "p.scale = 1.1f"),  # another computation
        ("p.window_right = kRight", "p.window_right = kRight + 1"),  # another mask
        ("p.dv = tensor(out.dv_memory", "p.dv = tensor(out.dk_memory"),  # left unwritten: still NaN
    ],
)
def test_the_example_of_gradients_fails_a_kernel_that_computes_something_else(tmp_path, there, instead):
    words = "--op backward --dtype fp32 --head-dim 16 --window 40,3"
    manifest = run_emit(tmp_path, f"--target cpu --config default --example {words} {SMALL}")
    text = (tmp_path / "main.cpp").read_text()
    assert there in text
    (tmp_path / "main.cpp").write_text(text.replace(there, instead))
    make(tmp_path, manifest["example"].replace("-O3", "-O1"))
    done = subprocess.run([tmp_path / "example"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "WRONG" in done.stdout


@needs_cxx
def test_the_example_of_decode_fails_a_kernel_that_computes_something_else(tmp_path):
    words = (
        "--op decode --dtype fp32 --head-dim 16 --page 16 --window 40,0 --seqlen-q 3 --seqlen-k 90 --heads 4 --batch 2"
    )
    run_emit(tmp_path, f"--target cpu --config default --example {words}")
    make(tmp_path, "g++ -std=c++17 -O1 -march=native -fopenmp -c kernel.cpp")
    text = (tmp_path / "main.cpp").read_text()
    for there, instead, right in (
        ("", "", True),
        ("p.scale = 1.f", "p.scale = 1.1f", False),  # another computation
        ("p.window_right = kRight", "p.window_right = kRight + 1", False),  # another mask
        ("upload(in.pages), {kPagesEach}", "upload(in.pages), {0}", False),  # the first sequence's pages
        ("p.lse = lse;", "p.lse = nullptr;", False),  # left unwritten: still NaN
    ):
        assert there in text
        (tmp_path / "main.cpp").write_text(text.replace(there, instead) if there else text)
        make(tmp_path, "g++ -std=c++17 -O1 -fopenmp -o example kernel.o main.cpp")
        done = subprocess.run([tmp_path / "example"], capture_output=True, text=True, timeout=60)
        assert done.returncode == (0 if right else 1), there
        assert ("right:" if right else "WRONG") in done.stdout


def test_the_example_of_a_tf32_kernel_allows_for_rounded_operands(tmp_path):
    words = "--target sm_90 --family sm80_forward_fp32 --config default --example --dtype fp32 --head-dim 64 " + SMALL
    for flag, unit, products in (("", "5e-06", "split"), (" --tf32", "0.0009765625", "single")):
        run_emit(folder := tmp_path / products, words + flag)
        assert f"kUnit = {unit};" in (folder / "main.cu").read_text()
        assert f"Products::{products};" in (folder / "kernel.cu").read_text()


@needs_nvcc
@pytest.mark.nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    sample(
        [
            "--target sm_90 --dtype fp16 --head-dim 64 --interval-kind lower1 --softcap --alibi",
            "--target sm_80 --dtype bf16 --head-dim 64 --mask causal",
            "--op backward --target sm_90 --dtype bf16 --head-dim 128 --mask causal",
            "--target sm_90 --dtype bf16 --head-dim 64 --mask causal --dropout",
            "--op decode --target sm_80 --dtype fp16 --head-dim 128 --kv-dtype fp8_e4m3 --page 64 --sinks",
        ],
        every=2,
    ),
)
def test_a_gpu_kernel_and_its_example_compile(tmp_path, words):
    manifest = run_emit(tmp_path, f"--config default --example --build {words}")
    assert manifest["facts"]["registers"] > 0
    assert manifest["facts"]["spill_bytes"] <= SPILL_TOLERANCE
    for name in ("kernel.so", "kernel.cubin", "example"):
        assert manifest["files"][name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_the_source_can_be_had_without_torch_a_gpu_or_a_compiler(tmp_path):
    program = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'optuna', 'numpy'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "from fagen.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    words = f"emit --debug --target sm_90 --head-dim 128 --dtype bf16 --mask causal --example --out {tmp_path}".split()
    environment = {"PATH": "", "PYTHONPATH": str(Path(emit.__file__).parent.parent), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    text = (tmp_path / "kernel.cu").read_text()
    assert '#include "' not in text, "one self-contained file"
    assert "fagen_launch" in text


def test_the_command_in_the_file_makes_the_same_file(tmp_path):
    knobs = dict(choose(*_problem_for("cpu"), "default")[0].config)
    name, value = next((k.name, c) for k in _family().knobs for c in k.choices if _legal(knobs, k.name, c))
    words = "--target cpu --dtype fp32 --head-dim 48-32 --window none,7 --softcap --seqlen-q 64 --seqlen-k 128"
    words += " --heads 6 --kv-heads 3"
    first = run_emit(tmp_path / "a", f"{words} --config '{json.dumps({**knobs, name: value})}'")
    assert first["config"][name] == value
    second = again(tmp_path / "b", first["command"])
    assert second["source_hash"] == first["source_hash"]
    assert (tmp_path / "a/kernel.cpp").read_bytes() == (tmp_path / "b/kernel.cpp").read_bytes()
    assert first["command"] in (tmp_path / "a/kernel.cpp").read_text()


def again(folder: Path, command: str) -> dict:
    """What the command of a manifest makes."""
    assert command.startswith("fagen emit ")
    assert command.endswith(" --out DIR")
    return run_emit(folder, command.removeprefix("fagen emit ").removesuffix(" --out DIR"))


@pytest.mark.parametrize("config", ["", "--config default", "--config best"])
def test_a_family_can_be_asked_for(tmp_path, config):
    first = run_emit(
        tmp_path / "a", f"--target sm_90 --dtype bf16 --head-dim 128 --mask causal --family sm80_forward {config}"
    )
    assert first["family"] == "sm80_forward"
    assert again(tmp_path / "b", first["command"])["source_hash"] == first["source_hash"]


@pytest.mark.parametrize(
    ("family", "target"), [("sm90_forward", "sm_90"), ("sm80_forward", "sm_80"), ("cpu_forward", "cpu")]
)
def test_a_family_alone_is_enough(tmp_path, monkeypatch, family, target):
    """The default problem, on a target that the family is for when this machine is none."""
    monkeypatch.setattr("fagen.target.detect", lambda: known("cpu"))
    manifest = run_emit(tmp_path, f"--family {family}")
    assert (manifest["family"], manifest["arch"]) == (family, target)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--target sm_90 --family sm8_forward", 2, "sm8_forward"),
        ("--target cpu --family sm90_forward", 1, "sm90_forward: needs"),
        ("--family sm90_forward --head-dim 2048", 2, "2048"),
    ],
)
def test_a_family_that_cannot_says_why(tmp_path, capsys, words, code, says):
    assert main.main(["emit", "--out", str(tmp_path), *words.split()]) == code
    err = capsys.readouterr().err
    assert says in err
    assert "sm80_forward" not in err or "known:" in err, "only the family that was asked for explains itself"


def test_a_family_gets_what_was_tuned_for_it(tmp_path, monkeypatch):
    """Its own record, though another family won the problem."""
    from fagen.db.merge import put
    from fagen.db.record import Record
    from fagen.families import get

    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    target = known("sm_90")
    problem = expand({"head_dim": 96, "mask": "causal", "heads": 3}, target)[0]
    family = get("sm80_forward")
    default = dict(family.default(problem, target))
    tuned = next(
        {**default, knob.name: value}
        for knob in family.knobs
        for value in knob.choices
        if value != default[knob.name]
        and not family.rejects(problem, target, family.config({**default, knob.name: value}))
    )
    put([Record(problem, "sm_90", target.device, family.name, tuned, 1e-3, 1e-6, 2e-3, 0.0, "0a54")])
    words = "--target sm_90 --head-dim 96 --mask causal --heads 3 --family sm80_forward"
    assert run_emit(tmp_path / "a", words)["config"] == tuned
    assert run_emit(tmp_path / "b", f"{words} --config default")["config"] == default


def test_the_command_makes_the_same_kernel_when_records_and_defaults_have_changed(tmp_path, monkeypatch):
    """Of a record whose config is the default of its day."""
    from fagen import families
    from fagen.db.merge import put
    from fagen.db.record import Record

    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path / "db"))
    (problem, target), family = _problem_for("cpu"), _family()
    default = dict(family.default(problem, target))
    put([Record(problem, "cpu", target.device, family.name, default, 1e-3, 1e-6, 1e-3, 0.0, "0a54")])
    first = run_emit(tmp_path / "a", "--target cpu --dtype fp32 --head-dim 48-32")
    assert "tuned on" in first["provenance"]
    assert first["config"] == default

    name, value = next((k.name, c) for k in family.knobs for c in k.choices if _legal(default, k.name, c))
    other = family.config({**default, name: value})
    put([Record(problem, "cpu", target.device, family.name, dict(other), 5e-4, 1e-6, 1e-3, 0.0, "0a54")])
    changed = dataclasses.replace(family, default=lambda problem, target: other)
    everyone = tuple(changed if f.name == family.name else f for f in families.all_families())
    monkeypatch.setattr(families, "all_families", lambda: everyone)
    assert run_emit(tmp_path / "b", "--target cpu --dtype fp32 --head-dim 48-32")["config"] == dict(other)
    second = again(tmp_path / "c", first["command"])
    assert second["config"] == default
    assert (tmp_path / "a/kernel.cpp").read_text().count(first["command"]) == 1
    assert second["source_hash"] == first["source_hash"]


def _family():
    from fagen import families

    return families.get("cpu_forward")


def _problem_for(arch):
    target = known(arch)
    return expand({"head_dim": "48-32", "dtype": "fp32"}, target)[0], target


def _legal(knobs, name, value):
    family, (problem, target) = _family(), _problem_for("cpu")
    return value != knobs[name] and family.rejects(problem, target, family.config({**knobs, name: value})) is None


def test_manifest_and_header_tell_the_truth(tmp_path):
    manifest = run_emit(tmp_path, "--target sm_80 --head-dim 128 --dtype fp16 --mask causal --config default")
    spec, _ = choose(expand({"head_dim": 128, "dtype": "fp16", "mask": "causal"})[0], known("sm_80"), "default")
    assert manifest["source_hash"] == spec.hash, "the hash that dispatch and database know"
    assert manifest["config"] == dict(spec.config)
    assert (tmp_path / "kernel.cu").read_text().endswith(spec.source)
    for name, sha in manifest["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sha
    assert manifest["facts"] is None


@needs_cxx
def test_the_header_is_plain_c(tmp_path):
    run_emit(tmp_path, "--target cpu --dtype fp32 --head-dim 64 --config default")
    (tmp_path / "use.c").write_text(
        '#include "kernel.h"\nint main(void) {\n  fagen_forward_params p = {0};\n'
        "  return fagen_launch(&p, 0) != (int)sizeof(p);\n}\n"
    )
    make(tmp_path, f"{toolchain.require_cxx()} -x c -std=c99 -Wall -Werror -fsyntax-only use.c")


@needs_cxx
def test_json_goes_to_stdout_alone_and_build_says_what_came_out(tmp_path, capsys):
    words = f"emit --target cpu --dtype fp32 --head-dim 16 --config default --build --json --out {tmp_path}"
    assert main.main(words.split()) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["files"].keys() == {"kernel.cpp", "kernel.h", "kernel.so"}
    assert "kernel.so" in err
    assert json.loads(out)["facts"]["compiler"]


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ("fastest", UsageError, "'fastest'"),
        ("[1]", UsageError, "no JSON object"),
        ("{}", InvalidConfig, "lacks knob"),
        ('{"speed": 11}', InvalidConfig, "'speed'"),
    ],
)
def test_a_config_that_is_none(config, error, says):
    with pytest.raises(error, match=says):
        choose(*_problem_for("cpu"), config)


def test_a_problem_that_no_family_serves_says_why():
    with pytest.raises(UnsupportedProblem, match="cpu_backward: head_dim 512"):
        choose(BackwardProblem(dtype="fp32", head_dim=512), known("cpu"), "default")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FagenError, match="cannot write"):
        emit.write(*choose(*_problem_for("cpu"), "default"), tmp_path / "file" / "folder")


def test_best_is_what_was_tuned(tmp_path, monkeypatch):
    from fagen.db.merge import put
    from fagen.db.record import Record

    monkeypatch.setenv("FAGEN_DB_DIR", str(tmp_path))
    problem, target = _problem_for("cpu")
    spec, provenance = choose(problem, target, "best")
    assert "default" in provenance
    knobs = dict(spec.config)
    name, value = next((k.name, c) for k in _family().knobs for c in k.choices if _legal(knobs, k.name, c))
    put([Record(problem, "cpu", target.device, "cpu_forward", {**knobs, name: value}, 1e-3, 1e-6, 2e-3, 0.0, "0f")])
    tuned, provenance = choose(problem, target, "best")
    assert tuned.config[name] == value
    assert target.device in provenance
