"""Carry the source hashes of tuned records and verified kernels over a change of form that left the machine code alone.

    python benchmarks/carry_hashes.py --tree OTHER_CHECKOUT

A record is stale once its kernel's source has changed. Where the source of OTHER_CHECKOUT, which is the one that was
tuned, compiles to the same instructions, encodings, registers and memory as today's, nothing that was measured or
verified has changed: the record gets today's hash. So does the note of a verified kernel in generated/, whose status
`make generated` then tells anew. It needs nvcc and nvdisasm, and no GPU. Whatever differs by one instruction is left
as it is, and named. `--moved-params` is for a change of the params struct: the offsets of fields may differ, and
nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def _disassembly() -> Any:
    spec = importlib.util.spec_from_file_location("disassembly", Path(__file__).with_name("disassembly.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules["disassembly"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked() -> dict[str, dict[str, Any]]:
    """Every tuned record of a GPU and every verified kernel: family, problem, target, config and the hash it has."""
    from fagen.db import audit, store

    found: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "tuning_db").rglob("*.json")):
        for r in store.open_file(path).records:
            target = vars(audit.target_of(r))
            about = {"family": r.family, "problem": r.problem.to_dict(), "target": target, "config": r.config}
            found[f"{path.name} {r.key} {r.family}"] = {**about, "hash": r.source_hash}
    for name, entry in json.loads((ROOT / "generated" / "manifest.json").read_text())["kernels"].items():
        if entry["verified"] and entry["arch"] != "cpu":
            about = {key: entry[key] for key in ("family", "problem", "config")}
            found[f"generated {name}"] = {**about, "target": entry["arch"], "hash": entry["verified"]["source_hash"]}
    return found


def render() -> None:
    """Reads what `asked` found, writes source and hash of each, by the checkout that PYTHONPATH names."""
    from fagen import families, ops, target
    from fagen.codegen.spec import KernelSpec

    told = {}
    for name, one in json.load(sys.stdin).items():
        where = (
            target.known(one["target"]) if isinstance(one["target"], str) else target.Target.from_dict(one["target"])
        )
        family = families.get(one["family"])
        problem = ops.get(family.op).problem.from_dict(one["problem"])
        spec = KernelSpec(family, problem, where, family.config(one["config"]))
        told[name] = {"source": spec.source, "hash": spec.hash, "flags": family.flags(where)}
    json.dump(told, sys.stdout)


def rendered(tree: Path, wanted: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, __file__, "--render"]
    done = subprocess.run(
        command, input=json.dumps(wanted), env=environment, cwd=tree, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"cannot render in {tree}")
    return json.loads(done.stdout)


def replace_hashes(carried: dict[str, tuple[str, str]]) -> None:
    """Old and new hash by what `asked` called it."""
    for path in [*(ROOT / "tuning_db").rglob("*.json"), ROOT / "generated" / "manifest.json"]:
        text = path.read_text()
        for name, (old, new) in carried.items():
            if name.split()[0] in (path.name, "generated" if path.name == "manifest.json" else ""):
                text = text.replace(f'"{old}"', f'"{new}"')  # of hashes there are no two alike
        path.write_text(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="the checkout whose sources were tuned")
    parser.add_argument(
        "--moved-params",
        nargs="*",
        metavar="OLD=NEW",
        help="fields of the params may lie elsewhere, under these new names; nothing else may differ",
    )
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"))
    parser.add_argument("--nvcc", default=shutil.which("nvcc"))
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--render", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.render:
        render()
        return 0
    if not args.tree or not args.nvcc or not args.nvdisasm:
        raise SystemExit("--tree, nvcc and nvdisasm are needed")
    disassembly, wanted = _disassembly(), asked()
    before, after = (rendered(tree.resolve(), wanted) for tree in (args.tree, ROOT))
    pairs = {
        (before[name]["hash"], after[name]["hash"]): name for name, one in wanted.items()
        if one["hash"] == before[name]["hash"] != after[name]["hash"]
    }  # fmt: skip

    def same(name: str) -> bool:
        if args.moved_params is not None:
            renamed = disassembly.renames(args.moved_params)
            found = disassembly.differences(before[name], after[name], (args.nvcc, args.nvdisasm), renamed)
            verdicts = [difference or "identical" for difference in found.values()]
        else:
            functions = (
                disassembly.measure(t[name]["source"], t[name]["flags"], args.nvcc, args.nvdisasm)
                for t in (before, after)
            )
            verdicts = [disassembly.verdict(*both) for both in disassembly.matched(*functions)]
        print(f"{name}: {', '.join(verdicts)}", file=sys.stderr)
        return all(verdict == "identical" for verdict in verdicts)

    with ThreadPoolExecutor(args.jobs) as pool:
        proven = dict(zip(pairs, pool.map(same, pairs.values()), strict=True))
    carried = {
        name: (before[name]["hash"], after[name]["hash"]) for name, one in wanted.items()
        if one["hash"] == before[name]["hash"] and proven.get((before[name]["hash"], after[name]["hash"]))
    }  # fmt: skip
    replace_hashes(carried)
    print(f"{len(carried)} of {len(wanted)} carried over; {sum(not good for good in proven.values())} kernels differ")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
