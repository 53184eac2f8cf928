"""Emit the kernels and build the program: `python build.py --target cpu --out build`, or `--target sm_90`.

The program needs neither Python nor torch. Each kernel serves all head dims up to its own, and its functions and its
namespace are renamed on the compiler's command line, so that they all fit in one program.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FUNCTIONS = ("launch", "workspace_bytes", "error", "params_layout")
# head dims of the kernels. On the CPU a kernel's loops end with the head dim; on a GPU they go on to the kernel's own.
SIZES = {"cpu": (256, 1024), "gpu": (16, 32, 64, 128, 256, 512, 1024)}


def emit(target: str, head_dim: int, aligned: bool, folder: Path) -> dict:
    words = [sys.executable, "-m", "fagen", "emit", "--target", target, "--dtype", "fp32", "--head-dim", str(head_dim)]
    words += ["--heads", str(max(1, 1024 // head_dim)), "--out", str(folder), *([] if aligned else ["--unaligned"])]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "manifest.json").read_text())


def compile_kernel(folder: Path, manifest: dict) -> Path:
    """By the command of its manifest, as an object."""
    name = folder.name
    words = [word for word in shlex.split(manifest["build"]) if word != "-shared"]
    words[words.index("kernel.so")] = "kernel.o"
    renamed = [f"-Dfagen_{function}={name}_{function}" for function in FUNCTIONS]
    subprocess.run([*words, "-c", f"-Dfagen=fagen_{name}", *renamed], cwd=folder, check=True)
    return folder / "kernel.o"


def table(kernels: list[tuple[str, int, bool]]) -> str:
    lines = [
        "// The emitted kernels, the smallest first. Made by build.py.",
        "#pragma once",
        '#include "attention.h"',
        "",
    ]
    for name, _, _ in kernels:
        lines.append(f'extern "C" int {name}_launch(const fagen_forward_params*, void*);')
        lines.append(f'extern "C" uint64_t {name}_workspace_bytes(const fagen_forward_params*);')
        lines.append(f'extern "C" const char* {name}_error(int);')
    rows = [f"    {{{d}, {str(a).lower()}, {n}_launch, {n}_workspace_bytes, {n}_error}}," for n, d, a in kernels]
    lines += ["", f"constexpr int kCount = {len(kernels)};", "const Kernel kKernels[kCount] = {", *rows, "};"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", help="cpu, or a GPU's architecture: sm_80, sm_90, ...")
    parser.add_argument("--out", type=Path, default=HERE / "build")
    parser.add_argument("--jobs", type=int, default=2, help="kernels that are compiled at a time")
    parser.add_argument("--sizes", type=int, nargs="+", help="head dims of the kernels (default: up to 1024)")
    args = parser.parse_args()
    gpu = args.target != "cpu"
    kinds = (True, False) if gpu else (False,)
    sizes = sorted(args.sizes or SIZES["gpu" if gpu else "cpu"])
    names = [(f"d{d}_{'aligned' if a else 'any'}", d, a) for d in sizes for a in kinds]
    out = args.out.resolve()
    manifests = [emit(args.target, d, a, out / name) for name, d, a in names]
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:
        objects = list(pool.map(lambda at: compile_kernel(out / names[at][0], manifests[at]), range(len(names))))
    (out / "kernels.h").write_text(table(names))
    words = shlex.split(manifests[0]["build"])
    flags = [w for w in words[1 : words.index("-o")] if w not in ("-shared", "-fPIC", "-Xcompiler")]
    (out / "kernel").mkdir(exist_ok=True)
    (out / "kernel" / "kernel.h").write_bytes((out / names[0][0] / "kernel.h").read_bytes())
    for name in ("main", "solve"):
        source = [*(["-x", "cu"] if gpu else []), "-c", str(HERE / f"{name}.cpp"), "-o", str(out / f"{name}.o")]
        subprocess.run([words[0], *flags, "-I", str(out), "-I", str(HERE), *source], check=True)
        objects.append(out / f"{name}.o")
    subprocess.run([words[0], *flags, "-o", str(out / "solve"), *map(str, objects)], check=True)
    print(f"{out / 'solve'}: {len(names)} kernels")


if __name__ == "__main__":
    main()
