"""Whether a change of form leaves the machine code alone: kernels compiled and disassembled, before and after.

    python benchmarks/disassembly.py snapshot --tree OTHER_CHECKOUT --out before.json
    python benchmarks/disassembly.py snapshot --out after.json
    python benchmarks/disassembly.py compare before.json after.json

`snapshot` needs nvcc and nvdisasm (of the CUDA toolkit, or `pip install nvidia-cuda-nvdisasm`), and no GPU. It renders
the kernels below in a checkout, adds the exported ones of its `generated/`, compiles all of them and writes for each
device function a hash of its instructions with their encodings, so that registers and scheduling count; and its
registers, spills and shared memory. Names, labels, addresses and line numbers do not count. `--quick` takes a few of
the kernels, `--only` those whose name matches. `--keep DIR` keeps what was disassembled, for a diff.

`compare` exits with 1 if a function differs. Functions are matched by their code first and by their names then, so a
renamed or moved one is identical. *reordered* is the same instructions in another order, or scheduled otherwise.

    python benchmarks/disassembly.py moved --tree OTHER_CHECKOUT --renamed q=q.data q_stride=q.stride ...

`moved` is for a change of the params struct. It compares instruction by instruction, strictly: moved_params.py.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # behind the checkout that PYTHONPATH names
SEQLEN = 4096  # some defaults depend on it

# name: what the problem asks for; the family's default serves it
DEFAULTS: dict[str, dict[str, Any]] = {
    "d64-none": {"head_dim": 64},
    "d64-causal": {"head_dim": 64, "mask": "causal"},
    "d64-causal-fp16": {"head_dim": 64, "mask": "causal", "dtype": "fp16"},
    "d64-causal-softcap": {"head_dim": 64, "mask": "causal", "softcap": True},
    "d64-window": {"head_dim": 64, "mask": "window", "window_left": 1024, "window_right": 0},
    "d64-both2": {"head_dim": 64, "mask": "intervals", "intervals": "both2"},
    "d80-none": {"head_dim": 80},
    "d96-softcap-alibi": {"head_dim": 96, "softcap": True, "alibi": True},
    "d96-causal": {"head_dim": 96, "mask": "causal"},
    "d128-none-fp16": {"head_dim": 128, "dtype": "fp16"},
    "d128-causal-gqa": {"head_dim": 128, "mask": "causal", "heads": 32, "kv_heads": 8},
    "d128-window": {"head_dim": 128, "mask": "window", "window_left": 1024, "window_right": 1024},
    "d128-causal-alibi": {"head_dim": 128, "mask": "causal", "alibi": True},
    "d128-both4-softcap": {"head_dim": 128, "mask": "intervals", "intervals": "both4", "softcap": True},
    "d128-lower2-alibi": {"head_dim": 128, "mask": "intervals", "intervals": "lower2", "alibi": True},
    "d192-128-causal": {"head_dim": 192, "head_dim_v": 128, "mask": "causal"},
    "d256-none": {"head_dim": 256},
    "d256-causal-fp16": {"head_dim": 256, "mask": "causal", "dtype": "fp16"},
    "d256-lower1": {"head_dim": 256, "mask": "intervals", "intervals": "lower1"},
}
SM90 = {
    "tile_m": 128, "tile_n": 64, "stages": 2, "q_stages": 1, "overlap": True, "rescale": "deferred",
    "ping_pong": False, "blocks_per_sm": 1, "schedule": "balanced", "block_order": "ascending", "section_mb": 32,
    "cluster": 1, "shared_weights": False, "pack_heads": False,
}  # fmt: skip
SM80 = {
    "tile_m": 64, "tile_n": 32, "warps": 4, "partition": "split_q", "loop_order": "q_outer", "stages": 2,
    "overlap": False, "q_source": "shared", "smem_layout": "swizzled", "blocks_per_sm": 1, "rescale": "deferred",
    "block_order": "ascending",
}  # fmt: skip
# name: a problem of DEFAULTS, and the knobs that differ from the base: together all values of the structural ones
SM90_KNOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "one-group": ("d64-causal", {"tile_m": 64, "blocks_per_sm": 2, "block_order": "longest_first"}),
    "three-blocks": ("d64-window", {"tile_m": 64, "blocks_per_sm": 3, "schedule": "dynamic"}),
    "three-groups": ("d64-causal", {"tile_m": 192, "tile_n": 96, "ping_pong": True, "block_order": "descending"}),
    "serial-single": ("d64-none", {"overlap": False, "schedule": "single", "ping_pong": True}),
    "each-two-q": ("d64-causal", {"rescale": "each", "q_stages": 2, "stages": 3, "schedule": "dynamic"}),
    "single-causal": ("d64-causal", {"schedule": "single", "block_order": "longest_first"}),
    "pair": ("d64-none", {"cluster": 2, "block_order": "sectioned"}),
    "pair-packed": ("d128-none-fp16", {"cluster": 2, "pack_heads": True, "ping_pong": True, "tile_n": 176}),
    "shared-weights": ("d128-window", {"tile_m": 192, "shared_weights": True, "stages": 1, "pack_heads": True}),
    "serial-each": ("d256-none", {"overlap": False, "rescale": "each", "tile_n": 80, "ping_pong": True}),
    "intervals-ascending": ("d64-both2", {"overlap": False, "tile_n": 128, "ping_pong": True}),
    "intervals-dynamic": ("d256-lower1", {"schedule": "dynamic", "block_order": "longest_first"}),
    "intervals-single": ("d64-both2", {"schedule": "single", "tile_m": 64, "blocks_per_sm": 2}),
}
SM80_KNOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "one-stage": ("d64-window", {"stages": 1, "block_order": "descending"}),
    "three-stages": ("d64-both2", {"stages": 3, "rescale": "each", "smem_layout": "padded"}),
    "q-in-registers": ("d64-causal", {"q_source": "registers", "stages": 1, "block_order": "sectioned"}),
    "overlap": ("d64-causal-softcap", {"overlap": True}),
    "overlap-intervals": ("d64-both2", {"overlap": True, "stages": 3, "q_source": "registers", "rescale": "each"}),
    "kv-outer": ("d64-both2", {"loop_order": "kv_outer", "stages": 1}),
    "kv-outer-registers": ("d64-causal", {"loop_order": "kv_outer", "stages": 1, "q_source": "registers"}),
    "split-k": ("d64-causal", {"partition": "split_k", "tile_m": 16, "tile_n": 64, "block_order": "longest_first"}),
    "split-k-overlap": ("d64-none", {"partition": "split_k", "tile_m": 32, "tile_n": 128, "overlap": True}),
    "pairs": ("d64-window", {"partition": "pairs", "tile_n": 64, "smem_layout": "padded", "rescale": "each"}),
    "unaligned": ("d80-none", {}),
}
QUICK = (
    "sm90 d64-causal", "sm90 d64-both2", "sm90 d128-causal-gqa", "sm90 pair-packed", "sm90 shared-weights",
    "sm90 single-causal", "sm80 d64-causal", "sm80 overlap-intervals", "sm80 kv-outer", "sm80 pairs",
)  # fmt: skip


# ---- render, in the checkout that PYTHONPATH names ------------------------------------------------------------------


def _module(*names: str) -> Any:
    """The first that is there: a module has moved between checkouts."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(names[-1])


def _source(*kernel: Any) -> str:
    """The source of family, problem, target and config, by the checkout's own way."""
    module = _module("fagen.codegen.spec", "fagen.codegen.render", "fagen.render")
    return module.KernelSpec(*kernel).source if hasattr(module, "KernelSpec") else module.source(*kernel)


def sources(tree: Path, wanted: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """The kernels of a checkout whose names are wanted: source and compiler flags."""
    families = importlib.import_module("fagen.families")
    known = importlib.import_module("fagen.target").known
    problem_type = _module("fagen.problem", "fagen.ops.attention.problem").Problem
    if tree not in Path(families.__file__).resolve().parents:
        raise SystemExit(f"fagen was imported from {families.__file__}, not from {tree}")
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, family: Any, arch: str, problem: dict[str, Any], base: dict[str, Any] | None) -> None:
        if not wanted(name):
            return
        sizes = {"batch": 4, "heads": 16, "seqlen_q": SEQLEN}
        asked, where = problem_type(**{**sizes, **problem}), known(arch)
        config = family.default(asked, where) if base is None else family.config(base)
        found[name] = {"source": _source(family, asked, where, config), "flags": family.flags(where)}

    for short, base, knobs, archs in (
        ("sm90", SM90, SM90_KNOBS, ("sm_90",)),
        ("sm80", SM80, SM80_KNOBS, ("sm_80", "sm_90")),
    ):
        family = families.get(f"{short}_forward")
        for i, (name, problem) in enumerate(DEFAULTS.items()):
            add(f"{short} {name}", family, archs[i % len(archs)], problem, None)
        for i, (name, (problem, changes)) in enumerate(knobs.items()):
            unaligned = {"aligned": False} if name == "unaligned" else {}
            add(f"{short} {name}", family, archs[i % len(archs)], DEFAULTS[problem] | unaligned, base | changes)
    for name, entry in json.loads((tree / "generated" / "manifest.json").read_text())["kernels"].items():
        if entry["arch"].startswith("sm_") and wanted(f"generated {name}"):
            text = (tree / "generated" / name / "kernel.cu").read_text()
            flags = families.get(entry["family"]).flags(known(entry["arch"]))
            found[f"generated {name}"] = {"source": text, "flags": flags}
    return found


def sources_of(tree: Path, only: str, quick: bool) -> dict[str, dict[str, Any]]:
    """The same by a process of its own, which imports that checkout's fagen."""
    command = [sys.executable, __file__, "render", "--tree", str(tree), "--only", only, *(["--quick"] if quick else [])]
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"cannot render in {tree}")
    return json.loads(done.stdout)


# ---- compile and disassemble ----------------------------------------------------------------------------------------


@dataclass
class Function:
    """A device function as it was compiled."""

    name: str
    hash: str = ""  # of the instructions, with encodings
    unordered: str = ""  # of the same, sorted and without encodings
    instructions: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)
    resources: str = ""  # as ptxas tells them
    spill_bytes: int = 0


_SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$.]+)")
_OTHER_SECTION = re.compile(r"^\s*\.section\s")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*/\* (0x[0-9a-f]{16}) \*/")
_OPCODE = re.compile(r"(?:@!?\w+ )?(\w+)")  # behind its predicate
_ENCODING = re.compile(r"^\s*/\* (0x[0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"\.L_\w+")
_SYMBOL = re.compile(r"[\w.$]*\b_?_Z\w+(?:\$\w+)*|[\w.$]*\$_Z\w+")


def plain_name(symbol: str) -> str:
    """By this checkout's fagen. Imported late: `render` runs with another checkout's, which may not have it."""
    from fagen.build import compiler

    return compiler.plain_name(symbol)


def _numbered(text: str, labels: dict[str, str]) -> str:
    """Labels by the order in which a function mentions them."""
    return _LABEL.sub(lambda m: labels.setdefault(m[0], f"<label {len(labels)}>"), text)


def normalised(listing: str) -> dict[str, list[tuple[str, str]]]:
    """nvdisasm's listing (-c -hex): of each function its instructions, each a text without names and an encoding."""
    functions: dict[str, list[tuple[str, str]]] = {}
    present: list[tuple[str, str]] = []
    labels: dict[str, str] = {}
    for line in listing.splitlines():
        if section := _SECTION.match(line):
            present = functions.setdefault(plain_name(section[1]), [])
            labels.clear()
        elif _OTHER_SECTION.match(line):
            present = []
        elif instruction := _INSTRUCTION.match(line):
            text = _SYMBOL.sub("<symbol>", instruction[1])
            text = _numbered(text, labels)
            present.append((re.sub(r"\s+", " ", text), instruction[2]))
        elif (more := _ENCODING.match(line)) and present:
            text, encoding = present[-1]
            present[-1] = text, f"{encoding} {more[1]}"
    return functions


def summary(name: str, code: list[tuple[str, str]]) -> Function:
    def digest(lines: list[str]) -> str:
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    texts = [re.sub(r"<label \d+>", "<label>", text) for text, _ in code]
    opcodes = collections.Counter(match[1] for text in texts if (match := _OPCODE.match(text)))
    exact = digest([f"{text} {encoding}" for text, encoding in code])
    return Function(name, exact, digest(sorted(texts)), len(code), dict(sorted(opcodes.items())))


def resources(log: str) -> dict[str, tuple[str, int]]:
    """What ptxas says (-v) of each function: its line of registers and memory, and bytes of spills."""
    found: dict[str, tuple[str, int]] = {}
    for part in log.split("Compiling entry function '")[1:]:
        used = re.search(r"Used (\d+ registers[^\n]*)", part)
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        line = re.sub(r", compile time[^\n]*|, \d+ bytes cmem\[\d\]|\s+$", "", used[1]) if used else ""
        found[plain_name(part.split("'", 1)[0])] = line, spills
    return found


def compiled(source: str, flags: list[str], nvcc: str, nvdisasm: str) -> tuple[str, bytes, str]:
    """A kernel as fagen compiles it: what the compiler said, the binary, its disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        path.write_text(source)
        done = subprocess.run([nvcc, *flags, "-cubin", "-o", cubin, path], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"nvcc refused a kernel\n{(done.stdout + done.stderr)[:4000]}")
        listing = subprocess.run([nvdisasm, "-c", "-hex", cubin], check=True, stdout=subprocess.PIPE, text=True).stdout
        return done.stdout + done.stderr, cubin.read_bytes(), listing


def measure(source: str, flags: list[str], nvcc: str, nvdisasm: str, keep: Path | None = None) -> list[Function]:
    """A kernel's device functions, compiled as fagen does."""
    log, _, listing = compiled(source, flags, nvcc, nvdisasm)
    told, functions = resources(log), []
    for name, code in normalised(listing).items():
        if not code or name not in told:
            raise SystemExit(f"{name}: no instructions in what nvdisasm printed, or no word of it from ptxas")
        function = summary(name, code)
        function.resources, function.spill_bytes = told[name]
        functions.append(function)
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name}.sass").write_text("".join(f"{text}\n" for text, _ in code))
    return functions


def tools(args: argparse.Namespace) -> tuple[str, str]:
    nvcc, nvdisasm = args.nvcc or shutil.which("nvcc"), args.nvdisasm or shutil.which("nvdisasm")
    if not nvcc or not nvdisasm:
        raise SystemExit("nvcc and nvdisasm are needed: put them on PATH, or give --nvcc and --nvdisasm")
    return nvcc, nvdisasm


def snapshot(args: argparse.Namespace) -> int:
    nvcc, nvdisasm = tools(args)
    kernels = sources_of(args.tree.resolve(), args.only, args.quick)
    print(f"{len(kernels)} kernels of {args.tree}", file=sys.stderr)

    def one(name: str) -> list[dict[str, Any]]:
        keep = args.keep / name.replace(" ", "-") if args.keep else None
        functions = measure(kernels[name]["source"], kernels[name]["flags"], nvcc, nvdisasm, keep)
        print(f"{name}: {', '.join(f'{f.name} {f.instructions}' for f in functions)}", file=sys.stderr)
        return [asdict(f) for f in functions]

    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(kernels, pool.map(one, kernels), strict=True))
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


# ---- compare --------------------------------------------------------------------------------------------------------


def matched(before: list[Function], after: list[Function]) -> list[tuple[Function | None, Function | None]]:
    """Pairs of functions: by their code, then by name, then what is left in order."""
    pairs: list[tuple[Function | None, Function | None]] = []
    left, right = list(before), list(after)
    for key in (lambda f: (f.hash, f.name), lambda f: f.hash, lambda f: f.name, lambda f: ""):
        for one in list(left):
            other = next((f for f in right if key(f) == key(one)), None)
            if other:
                pairs.append((one, other))
                left.remove(one)
                right.remove(other)
    return pairs + [(one, None) for one in left] + [(None, other) for other in right]


def verdict(one: Function | None, other: Function | None) -> str:
    if one is None or other is None:
        return "added" if one is None else "removed"
    if one.hash == other.hash:
        return "identical" if (one.resources, one.spill_bytes) == (other.resources, other.spill_bytes) else "different"
    return "reordered" if one.unordered == other.unordered else "different"


def describe(one: Function | None, other: Function | None) -> str:
    """Instructions that are more or fewer, and resources where they changed."""
    if one is None or other is None:
        return ""
    words = [f"{one.instructions} -> {other.instructions} instructions ({other.instructions - one.instructions:+d})"]
    names = sorted(one.opcodes.keys() | other.opcodes.keys())
    changes = {name: other.opcodes.get(name, 0) - one.opcodes.get(name, 0) for name in names}
    words += [f"{name} {n:+d}" for name, n in sorted(changes.items(), key=lambda c: -abs(c[1]))[:6] if n]
    if (one.resources, one.spill_bytes) != (other.resources, other.spill_bytes):
        words.append(f"{one.resources}, {one.spill_bytes} spilled -> {other.resources}, {other.spill_bytes} spilled")
    return ", ".join(words)


def compare(before: dict[str, Any], after: dict[str, Any], show_all: bool) -> int:
    counts: collections.Counter[str] = collections.Counter()
    for name in [*before, *(n for n in after if n not in before)]:
        if name not in before or name not in after:
            counts["only in one"] += 1
            print(f"{name}: only {'before' if name in before else 'after'}")
            continue
        pairs = matched([Function(**f) for f in before[name]], [Function(**f) for f in after[name]])
        for one, other in pairs:
            said = verdict(one, other)
            counts[said] += 1
            if said != "identical" or show_all:
                names = dict.fromkeys(f.name for f in (one, other) if f)
                print(f"{said:10} {name}: {' -> '.join(names)} {describe(one, other)}")
    print(", ".join(f"{n} {said}" for said, n in counts.most_common()))
    return 0 if set(counts) <= {"identical"} else 1


# ---- params that moved ----------------------------------------------------------------------------------------------


def moved_params() -> Any:
    """The script beside this one. Imported late: `render` runs with another checkout's fagen."""
    spec = importlib.util.spec_from_file_location("moved_params", Path(__file__).with_name("moved_params.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules["moved_params"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts(source: str, flags: list[str], tools: tuple[str, str], renamed: dict[str, str]) -> dict[str, tuple[Any, ...]]:
    """Of each device function its instructions, its layout of arguments, its resources."""
    moved = moved_params()
    log, cubin, listing = compiled(source, flags, *tools)
    arguments = {plain_name(symbol): of for symbol, of in moved.arguments_of(cubin).items()}
    told = resources(log)
    return {
        name: (code, moved.Layout.of(source, arguments[name], renamed), told[name])
        for name, code in normalised(listing).items()
    }


def differences(
    before: dict[str, Any], after: dict[str, Any], tools: tuple[str, str], renamed: dict[str, str]
) -> dict[str, str]:
    """Of each device function of two sources the first difference beside moved params, empty where none is."""
    moved = moved_params()
    one, other = (parts(k["source"], k["flags"], tools, r) for k, r in ((before, renamed), (after, {})))
    if not one or one.keys() != other.keys():
        return {"all": f"{', '.join(one)} -> {', '.join(other)}"}
    found = {}
    for name, (code, layout, told) in one.items():
        code_after, layout_after, told_after = other[name]
        found[name] = moved.difference(code, code_after, layout, layout_after)
        if told != told_after:
            found[name] = f"{told} -> {told_after}"
    return found


def moved(args: argparse.Namespace) -> int:
    chosen = tools(args)
    before, after = (sources_of(tree, args.only, args.quick) for tree in (args.tree.resolve(), ROOT))
    if before.keys() != after.keys():
        raise SystemExit(f"only in one: {', '.join(sorted(before.keys() ^ after.keys()))}")
    with ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda name: differences(before[name], after[name], chosen, renames(args.renamed)), before)
        count: collections.Counter[str] = collections.Counter()
        for name, functions in zip(before, found, strict=True):
            for function, difference in functions.items():
                count["different" if difference else "identical but for moved params"] += 1
                if difference or args.all:
                    print(f"{name}: {function}: {difference or 'identical but for moved params'}", flush=True)
    print(", ".join(f"{n} {said}" for said, n in count.most_common()))
    return 1 if count["different"] else 0


def renames(pairs: list[str]) -> dict[str, str]:
    """Old and new names of fields."""
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(found.values()) or len(found) < len(pairs):
        raise SystemExit("--renamed takes OLD=NEW, each field once")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="part", required=True)
    one = verbs.add_parser("snapshot", help="compile and disassemble the kernels of a checkout")
    two = verbs.add_parser("compare", help="print which functions changed between two snapshots")
    three = verbs.add_parser("render", help="print the kernels' sources as JSON; snapshot calls it")
    four = verbs.add_parser("moved", help="compare another checkout's kernels with this one's, whose params have moved")
    for part in (one, three, four):
        part.add_argument("--tree", type=Path, default=ROOT, help="a checkout of fagen (this one)")
        part.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
        part.add_argument("--only", default="", metavar="REGEX", help="only kernels whose name matches")
    one.add_argument("--out", type=Path, required=True)
    for part in (one, four):
        part.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
        part.add_argument("--nvcc")
        part.add_argument("--nvdisasm")
    one.add_argument("--keep", type=Path, metavar="DIR", help="keep the disassembly of each function there")
    four.add_argument("--renamed", nargs="*", default=[], metavar="OLD=NEW", help="fields of another name there")
    four.add_argument("--all", action="store_true", help="print identical functions as well")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    two.add_argument("--all", action="store_true", help="print identical functions as well")
    args = parser.parse_args(argv)
    if args.part == "snapshot":
        return snapshot(args)
    if args.part == "moved":
        return moved(args)
    if args.part == "render":
        only = re.compile(args.only)
        wanted = sources(
            args.tree.resolve(), lambda name: (name in QUICK or not args.quick) and bool(only.search(name))
        )
        print(json.dumps(wanted))
        return 0
    return compare(json.loads(args.before.read_text()), json.loads(args.after.read_text()), args.all)


if __name__ == "__main__":
    sys.exit(main())
