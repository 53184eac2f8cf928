"""PyTorch's switch for TF32: who asks it, when, and through which of its interfaces."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fagen.build import toolchain
from fagen.errors import InvalidArgument
from fagen.ops.attention import forward_calls, tf32
from fagen.ops.attention.backward_call import BackwardCall
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.ops.attention.problem import Problem
from fagen.runtime import binding

GPU: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
HALF: Any = SimpleNamespace(dtype=torch.float16, device=torch.device("cuda"))


@pytest.fixture
def switch() -> Any:
    """PyTorch's, as it was afterwards."""
    before = torch.get_float32_matmul_precision()
    yield torch.backends.cuda.matmul
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(before)


def test_the_old_switch(switch: Any) -> None:
    for precision, allows in (("highest", False), ("high", True), ("highest", False)):
        torch.set_float32_matmul_precision(precision)
        assert tf32.allowed(GPU) is allows and not tf32.allowed(HALF)


def test_the_new_switch(switch: Any) -> None:
    """With it set, PyTorch throws at who reads the old one."""
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("this PyTorch has the old switch alone")
    for precision, allows in (("tf32", True), ("ieee", False)):
        switch.fp32_precision = precision
        assert tf32.allowed(GPU) is allows


def test_a_call_says_what_the_switch_said_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 8, 2, 16)
    assert not AttentionCall.of(q, q, q).problem.tf32  # on the CPU nothing is rounded
    monkeypatch.setattr(tf32, "allowed", lambda t: True)
    call = AttentionCall.of(q, q, q)
    assert call.problem.static_key == "forward/fp32/d16/none/tf32"
    out, lse = torch.empty_like(q), torch.empty(1, 2, 8)
    assert BackwardCall.after(call, out, lse, out).problem == BackwardProblem.of(call.problem)  # which rounds nothing


def test_a_kernel_that_does_not_round_serves_who_allows_it_and_not_the_other_way_round() -> None:
    q = torch.randn(1, 8, 2, 16)
    exact = AttentionCall.of(q, q, q)
    allows = dataclasses.replace(exact, tf32=True)
    forward_calls.require_problem(exact.problem, allows)
    forward_calls.require_problem(allows.problem, allows)
    with pytest.raises(InvalidArgument, match="the kernel is for forward/fp32/d16/none/tf32"):
        forward_calls.require_problem(allows.problem, exact)


def test_only_float32_is_rounded_to_tf32() -> None:
    for kind, dtype in ((Problem, "bf16"), (DecodeProblem, "fp32"), (BackwardProblem, "fp32")):
        with pytest.raises(InvalidArgument, match="tf32"):
            kind(dtype=dtype, tf32=True)
    rounded = Problem(dtype="fp32", tf32=True)
    assert Problem.from_dict(rounded.to_dict()) == rounded and "tf32" not in rounded.replace(tf32=False).to_dict()


def test_the_binding_asks_a_switch_that_its_pytorch_has(tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    if toolchain.cxx() is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "switch.cpp"
    source.write_text(f"#include <ATen/Context.h>\nbool allowed() {{ return {binding._tf32_switch()}; }}\n")
    folders = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    done = subprocess.run(
        [str(toolchain.require_cxx()), "-std=c++20", "-fsyntax-only", *folders, str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
