"""Emitted kernels of decode and the programs around them: built by the commands that they name, and run."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from fagen.build import toolchain
from fagen.cli import generated
from fagen.target import detect
from tests.repository.test_examples import EXAMPLES, command_of

DECODERS = [
    name for name, (spec, _) in generated.listed().items() if spec.problem.op == "decode" and spec.target.is_gpu
]
pytestmark = pytest.mark.skipif(detect().arch != "sm_90", reason="the kernels of generated/ are for sm_90")


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", DECODERS)
def test_a_kernel_beside_its_own_example(name, tmp_path):
    words = shlex.split(generated.read_manifest()[name]["example"])
    words = [str(generated.ROOT / name / word) if word.endswith(".cu") else word for word in words]
    run([str(toolchain.require_nvcc()), *words[1:]], tmp_path)
    assert "right: largest error" in run([str(tmp_path / "example")], tmp_path)


def test_the_loop_of_decoding(tmp_path):
    run([str(toolchain.require_nvcc()), *command_of(EXAMPLES / "decode_loop.cpp", "nvcc")[1:]], tmp_path)
    assert "right: 120 tokens" in run([str(tmp_path / "decode_loop")], tmp_path)
