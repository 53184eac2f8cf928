"""A kernel as files: source, C header, manifest; binaries and an example if asked for. Needs no GPU, no torch."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fagen import __version__, ops
from fagen.build import cache, toolchain
from fagen.codegen import render
from fagen.codegen.spec import KernelSpec
from fagen.errors import BuildError, FagenError, UsageError
from fagen.ops import abi
from fagen.target import Target

HEADER, MANIFEST = "kernel.h", "manifest.json"
_VERBOSE = "-Xptxas=-v"  # makes nvcc say registers and spills
_UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-9, "fp32": 5e-6}  # what an example allows for, a rounding
_TF32_UNIT = 2.0**-10  # both operands of a product are rounded

_FUNCTIONS = """
// fagen_params_layout() of the kernel that this header belongs to.
#define FAGEN_PARAMS_LAYOUT "{layout}"

#ifdef __cplusplus
extern "C" {{
#endif
// Enqueues the kernel on `stream` (a cudaStream_t; ignored on the CPU). 0, or a code for fagen_error().
int fagen_launch(const {params}* params, void* stream);
const char* fagen_error(int code);
// What params->workspace must hold; the other fields must be set, pointers aside.
uint64_t fagen_workspace_bytes(const {params}* params);
// Name, offset and size of every field of the params as the kernel was built. Another text than FAGEN_PARAMS_LAYOUT:
// this header is of another kernel.
const char* fagen_params_layout(void);
#ifdef __cplusplus
}}
#endif
"""


def source_name(spec: KernelSpec) -> str:
    return f"kernel{spec.suffix}"


def command(spec: KernelSpec) -> str:
    """The `fagen emit` that makes the same kernel again, whatever the database and the defaults say then."""
    p = spec.problem
    words = ["fagen", "emit", "--target", spec.target.arch, *ops.get(p.op).flags(p)]
    words += ["--family", spec.family.name, "--config", spec.config.to_json(), "--out", "DIR"]
    return shlex.join(words)


def build_command(spec: KernelSpec, sources: Iterable[str], output: str, extra: Iterable[str] = ()) -> list[str]:
    """One compiler call with the flags that fagen itself builds with."""
    compiler = "nvcc" if spec.target.is_gpu else "g++"
    flags = [flag for flag in spec.family.flags(spec.target) if flag != _VERBOSE]
    return [compiler, *flags, *extra, "-o", output, *sources]


def shared_command(spec: KernelSpec, output: str = "kernel.so") -> list[str]:
    pic = ["-Xcompiler", "-fPIC"] if spec.target.is_gpu else ["-fPIC"]
    return build_command(spec, [source_name(spec)], output, ["-shared", *pic])


def example_command(spec: KernelSpec) -> list[str]:
    return build_command(spec, [source_name(spec), f"main{spec.suffix}"], "example")


# ---- texts ----------------------------------------------------------------------------------------------------------


def kernel_text(spec: KernelSpec, provenance: str) -> str:
    """The source under a banner that says where it comes from and how to build and call it."""
    title = ops.get(spec.problem.op).title
    needs = "the CUDA toolkit" if spec.target.is_gpu else "a C++17 compiler"
    banner = [
        f"A kernel for {title}, made by fagen. It needs {needs} and nothing else: no torch, no Python.",
        "",
        f"problem:  {spec.problem.static_key}, its config chosen for {spec.problem.size_key}",
        f"config:   {spec.config} ({provenance})",
        f"made by:  {command(spec)}",
        f"build:    {shlex.join(shared_command(spec))}",
        f"call:     fagen_launch(), declared in {HEADER} beside this file",
    ]
    return _comment(banner) + "\n" + spec.source


def header_text(spec: KernelSpec) -> str:
    op = ops.get(spec.problem.op)
    params = render.fold(f'#include "{op.header}"\n')
    functions = _FUNCTIONS.format(params=abi.name_of(op.header), layout=abi.layout(abi.params(op.header)))
    lines = [
        f"The interface of {source_name(spec)}: {op.title} for {spec.problem.static_key}",
        f"on {spec.target.arch}. Plain C. All kernels of fagen have this interface; to link two of them into one",
        "program, rename functions and namespace by the compiler: -Dfagen_launch=first_launch ... -Dfagen=first.",
    ]
    return f"{_comment(lines)}#pragma once\n{params}{functions}"


def example_text(spec: KernelSpec) -> str:
    op, tf32 = ops.get(spec.problem.op), getattr(spec.problem, "tf32", False)
    if not op.example:
        raise UsageError(f"{op.title} has no example program", remedy="leave --example out")
    text = render.render(
        op.example,
        problem=spec.problem,
        gpu=spec.target.is_gpu,
        **op.example_names(spec.problem),
        flops=spec.problem.flops(),
        unit=_TF32_UNIT if tf32 else _UNIT[spec.problem.dtype],
        lse_unit="4e-3" if tf32 else "1e-3",
        build_command=shlex.join(example_command(spec)),
        binary="example",
    )
    return render.fold(text)


def _comment(lines: Iterable[str]) -> str:
    """Lines of a C comment, whatever they hold: each is one line of its own, and none goes on in the next."""
    return "".join(f"// {_one_line(line)}".rstrip() + "\n" for line in lines)


def _one_line(text: str) -> str:
    """Escaped where it does not print; a compiler would join what ends in a backslash (or its trigraph) to the code."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text).rstrip()
    return text + "." if text.endswith(("\\", "??/")) else text


# ---- files ----------------------------------------------------------------------------------------------------------


def write(spec: KernelSpec, provenance: str, folder: Path, *, example: bool = False) -> dict[str, Any]:
    """The files that need no compiler; the manifest, as written. `provenance` is in words: "tuned on NVIDIA H200"."""
    texts = {source_name(spec): kernel_text(spec, provenance), HEADER: header_text(spec)}
    if example:
        texts[f"main{spec.suffix}"] = example_text(spec)
    manifest = {
        "fagen": __version__,
        "arch": spec.target.arch,
        "family": spec.family.name,
        "problem": spec.problem.to_dict(),
        "config": dict(spec.config),
        "provenance": provenance,
        "source_hash": spec.hash,
        "command": command(spec),
        "build": shlex.join(shared_command(spec)),
        "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        "facts": None,
    }
    if example:
        manifest["example"] = shlex.join(example_command(spec))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        _write_manifest(folder, manifest)
    except OSError as error:
        raise FagenError(f"cannot write to {folder}", str(error), "give another folder to --out") from error
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def compile_all(spec: KernelSpec, folder: Path, manifest: dict[str, Any], *, example: bool = False) -> dict[str, Any]:
    """kernel.so, on a GPU kernel.cubin, and the example, beside the sources; the manifest with the facts."""
    commands = {"kernel.so": shared_command(spec)}
    if spec.target.is_gpu:
        commands["kernel.cubin"] = build_command(spec, [source_name(spec)], "kernel.cubin", ["-cubin", _VERBOSE])
    if example:
        commands["example"] = example_command(spec)
    files, log = dict(manifest["files"]), ""
    for name, words in commands.items():
        log += _compile(spec.target, words, folder)
        files[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    done = {**manifest, "files": files, "facts": _facts(spec, log)}
    _write_manifest(folder, done)
    return done


def _compile(target: Target, words: list[str], folder: Path) -> str:
    compiler = toolchain.require_nvcc() if target.is_gpu else toolchain.require_cxx()
    done = subprocess.run([str(compiler), *words[1:]], cwd=folder, capture_output=True, text=True, errors="replace")
    log = done.stdout + done.stderr
    if done.returncode:
        first = next((line for line in log.splitlines() if "error" in line), log.strip()[-200:])
        raise BuildError(f"{compiler.name} refused the emitted kernel in {folder}", first, shlex.join(words), log=log)
    return log


def _facts(spec: KernelSpec, log: str) -> dict[str, Any]:
    """The compiler, what it said of registers and spills, and what fagen derived."""
    compiler = toolchain.nvcc() if spec.target.is_gpu else toolchain.cxx()
    facts: dict[str, Any] = {"compiler": toolchain.compiler_version(compiler)} if compiler else {}
    if spec.target.is_gpu:
        facts |= cache.parse_ptxas(log)
    return facts | spec.derived
