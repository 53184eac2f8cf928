"""CUDA kernels on the CPU: their own source over tests/emulator, which stands in for CUDA and for fagen/ptx/."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from fagen.build import toolchain
from fagen.codegen import render
from fagen.codegen.spec import KernelSpec
from fagen.ops import abi
from fagen.ops.attention.params import Params, make_params
from fagen.runtime.kernel import Library, workspace_tensor

if TYPE_CHECKING:
    import torch

    from fagen.families import Config, Family
    from fagen.ops.attention.call import AttentionCall
    from fagen.ops.attention.problem import Problem
    from fagen.target import Target

EMULATOR = Path(__file__).parents[1] / "emulator"
_WGMMA = re.compile(
    r"^namespace fagen::ptx \{\n.*?^\}  // namespace fagen::ptx\n", re.MULTILINE | re.DOTALL
)  # rendered, no header
_DYNAMIC = re.compile(r"extern __shared__ .*?unsigned char (\w+)\[\];")
_STATIC = re.compile(r"__shared__ ([\w:]+) (\w+)(\[\w+\])?;")
_ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half", "fp32": "float"}
_BEGIN = """
extern "C" void emulator_begin(uint64_t seed, int units) { emulator::begin(seed, units, %d); }
"""
# -Og: a kernel runs once or three times, so that its compilation is most of what it costs
_FLAGS = ("-std=c++17", "-Og", "-fno-exceptions", "-w", "-fPIC")


def source(family: Family, problem: Problem, target: Target, config: Config) -> str:
    """What a C++ compiler takes, of a family's kernel."""
    return translated(KernelSpec(family, problem, target, config).rendered, problem.dtype)


def translated(rendered: str, dtype: str) -> str:
    """CUDA as C++: the emulator's fagen/ptx/ for ours, shared variables and launches by functions."""
    text = render.fold(_WGMMA.sub("", rendered), EMULATOR)
    base = 0x400 if re.search(r"extern __shared__ __align__\(1024\)", text) else 0x430  # aligned as little as may be
    text = _DYNAMIC.sub(r"unsigned char* \1 = emulator::dynamic_shared();", text)
    text = _STATIC.sub(lambda m: f'auto& {m[2]} = emulator::shared_variable<{m[1]}{m[3] or ""}>("{m[2]}");', text)
    text = re.sub(r"(\w+(?:<\w+, \w+>)?)<<<(.*?)>>>", r"emulator::start(\1, \2)", text)
    return f"#define EMULATOR_ELEMENT {_ELEMENTS[dtype]}\n{text}{_BEGIN % base}"


def build(text: str, folder: Path, params: abi.Struct = Params) -> Library:
    """Compiled once for all who share the folder, whatever processes they are."""
    folder = _common(folder)
    library = folder / f"{render.source_hash(text)}.so"
    with filelock.FileLock(library.with_suffix(".lock")):
        if not library.exists():
            path = library.with_suffix(".cpp")
            path.write_text(text)
            _compile(path, library, "-shared", "-include", str(folder / "all.h"))
    return Library(library, params)


@functools.cache
def _common(folder: Path) -> Path:
    """A folder of this emulator and compiler, with what all kernels share: the emulator, loaded, and its headers.

    A process has one folder: the symbols of a second emulator would be those of the first.
    """
    files = [path for path in sorted(EMULATOR.rglob("*")) if path.suffix in (".h", ".cpp")]
    facts = [toolchain.compiler_version(toolchain.require_cxx()), *_FLAGS, *(path.read_text() for path in files)]
    folder = folder / hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "emulator.so"
    with filelock.FileLock(folder / "common.lock"):
        if not library.exists():
            (folder / "all.h").write_text(f'#include "{EMULATOR}/cuda/all.h"\n')
            _compile(folder / "all.h", folder / "all.h.gch", "-x", "c++-header")
            _compile(EMULATOR / "emulator.cpp", library, "-shared", "-O2")
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return folder


def _compile(source: Path, to: Path, *flags: str) -> None:
    """`to` appears when it is whole."""
    part = to.with_suffix(".part")
    command = [
        str(toolchain.require_cxx()),
        *_FLAGS,
        "-I",
        str(EMULATOR / "cuda"),
        *flags,
        str(source),
        "-o",
        str(part),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:8000]
    part.rename(to)


def launch(
    library: Library,
    call: AttentionCall,
    outputs: dict[str, torch.Tensor],
    *,
    seed: int = 0,
    units: int = 3,
    fill: Callable[[Any, dict[str, torch.Tensor]], ctypes.Structure] = make_params,
) -> None:
    """On a GPU of so many SMs; `seed` decides what comes first wherever that is open. `fill`: the op's params."""
    import torch

    library._library.emulator_begin(ctypes.c_uint64(seed), ctypes.c_int(units))
    params: Any = fill(call, outputs)
    memory = torch.empty(0)
    if need := library.workspace_bytes(ctypes.byref(params)):
        memory, params.workspace = workspace_tensor(need, torch.device("cpu"))
        memory.fill_(0xA5)
    status = library.launch(ctypes.byref(params), None)
    assert status == 0, library.error(status).decode()
