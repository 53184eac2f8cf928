"""A kernel whose functions are renamed and moved is the same machine code, and benchmarks/disassembly.py sees it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from fagen import target
from fagen.build import toolchain
from fagen.codegen.spec import KernelSpec
from fagen.families import sm80_forward
from fagen.ops.attention.problem import Problem

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "disassembly.py"


@pytest.mark.skipif(shutil.which("nvdisasm") is None, reason="needs nvdisasm, which is not on PATH")
def test_renamed_symbols_are_the_same_code() -> None:
    spec = importlib.util.spec_from_file_location("disassembly", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = sys.modules["disassembly"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    family, where, problem = sm80_forward.FAMILY, target.known("sm_80"), Problem(head_dim=64)
    text = KernelSpec(family, problem, where, family.default(problem, where)).source
    changed = text.replace("1.f / row_sum[r]", "2.f / row_sum[r]")
    assert changed != text
    tools = str(toolchain.require_nvcc()), str(shutil.which("nvdisasm"))
    before, renamed, other = (
        {"kernel": [vars(f) for f in script.measure(version, list(family.flags(where)), *tools)]}
        for version in (text, text.replace("forward_kernel", "renamed_kernel"), changed)
    )
    assert {f["name"] for f in before["kernel"]} == {"forward_kernel", "extents_kernel"}
    assert script.compare(before, renamed, False) == 0
    assert script.compare(before, other, False) == 1
    first, second, third = (
        {"source": version, "flags": list(family.flags(where))}
        for version in (text, text.replace("{\n  fagen_tensor q;", "{\n  int32_t more;\n  fagen_tensor q;"), changed)
    )
    assert script.differences(first, second, tools, {}) == {"forward_kernel": "", "extents_kernel": ""}
    assert script.differences(first, third, tools, {})["forward_kernel"]
