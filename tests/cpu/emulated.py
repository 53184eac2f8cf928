"""CUDA kernels on the CPU: their own source over tests/emulator, which stands in for CUDA and for fagen/ptx/."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen import render, toolchain
from fagen.bench.ahead import together
from fagen.kernel import Library, make_params, workspace_tensor
from fagen.tuner.workers import compile_workers

if TYPE_CHECKING:
    import torch

    from fagen.families import Config, Family
    from fagen.problem import Problem
    from fagen.target import Target

EMULATOR = Path(__file__).parents[1] / "emulator"
_WGMMA = re.compile(r"^namespace ptx \{\n.*?^\}  // namespace ptx\n", re.MULTILINE | re.DOTALL)  # rendered, no header
_DYNAMIC = re.compile(r"extern __shared__ .*?unsigned char (\w+)\[\];")
_STATIC = re.compile(r"__shared__ ([\w:]+) (\w+)(\[\w+\])?;")
_ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half"}


def source(family: Family, problem: Problem, target: Target, config: Config) -> str:
    """What a C++ compiler takes: the emulator's fagen/ptx/ for ours, shared variables and launches by functions."""
    text = render.fold(_WGMMA.sub("", render.render(family, problem, target, config)), EMULATOR)
    base = 0x400 if re.search(r"extern __shared__ __align__\(1024\)", text) else 0x430  # aligned as little as may be
    text = _DYNAMIC.sub(r"unsigned char* \1 = emulator::dynamic_shared();", text)
    text = _STATIC.sub(lambda m: f'auto& {m[2]} = emulator::shared_variable<{m[1]}{m[3] or ""}>("{m[2]}");', text)
    text = re.sub(r"(\w+)<<<(.*?)>>>", r"emulator::start(\1, \2)", text)
    return f"#define EMULATOR_ELEMENT {_ELEMENTS[problem.dtype]}\n#define EMULATOR_SHARED_BASE {base}\n{text}"


def build(text: str, folder: Path) -> Library:
    path = folder / f"{render.source_hash(text)}.cpp"
    library = path.with_suffix(".so")
    if not library.exists():
        path.write_text(text)
        flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-I", str(EMULATOR / "cuda")]
        command = [str(toolchain.require_cxx()), *flags, str(path), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:8000]
    return Library(library)


def build_all(texts: Iterable[str], folder: Path) -> None:
    together(lambda text: build(text, folder), dict.fromkeys(texts), compile_workers(is_gpu=False))


def launch(
    library: Library, q: torch.Tensor, *others: torch.Tensor, seed: int = 0, units: int = 3, **options: Any
) -> None:
    """On a GPU of so many SMs; `seed` decides what comes first wherever that is open."""
    import torch

    library._library.emulator_seed(ctypes.c_uint64(seed), ctypes.c_int(units))
    params, memory = make_params(q, *others, **options), torch.empty(0)
    if need := library.workspace_bytes(ctypes.byref(params)):
        memory, params.workspace = workspace_tensor(need, torch.device("cpu"))
        memory.fill_(0xA5)
    status = library.launch(ctypes.byref(params), None)
    assert status == 0, library.error(status).decode()
