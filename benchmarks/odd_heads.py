"""Loads that begin at sectors of L2, for head dims that are multiples of 8 alone: kernels to be timed.

    python benchmarks/odd_heads.py --out odd.json       # no GPU needed
    python benchmarks/variants.py time odd.json --base plain --peers fa3 --fa3 PATH --out timed.json

Every other head of such a size begins in the middle of a sector of 32 bytes. The kernel of a row of `bench --suite
odd-d` is rendered as dispatch picks it, and then changed in its text:

    early          heads that begin in the middle of a sector are loaded 8 columns early; TMA fills those with zeros
    early, pairs of v     the same, but v by a map over pairs of heads: no row ends or begins in the middle of a sector
    early, pairs of k, v  k as well. Beside a row of k stand numbers of the other head, times zeros of q: not for NaN
    cluster        two blocks load each tile once; without a mask

Heads must lie side by side, and be even in number.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fagen import target
from fagen.bench import suites
from fagen.codegen.spec import KernelSpec
from fagen.dispatch import choose
from fagen.families import sm90_forward

ROWS = (
    "d72 full s8192",
    "d72 causal s8192",
    "d104 full s8192",
    "d104 causal s8192",
    "d88 full s8192",
    "d40 full s8192",
)
VARIANTS = ("early", "early, pairs of v", "early, pairs of k, v")

_LOAD = "  __device__ __forceinline__ void load_{}(const RowTile<C>& row_tile{}) {{\n"
_MAP = "  if (const cudaError_t e = keys(&launch.{0}, p.{0}, p.{1})) return e;\n"
_PAIR_MAP = """  const Dimension {0}_rows = {{p.seqlen_k, p.{0}.stride[1], C::kTileN / C::kCluster}};
  const Dimension {0}_pairs = {{p.kv_heads / 2, p.{0}.stride[2] * 2, 1}}, {0}_batch = {{p.batch, p.{0}.stride[0], 1}};
  if (const cudaError_t e = make_map(&launch.{0}, type, p.{0}.data, 2 * p.{1}, {{{0}_rows, {0}_pairs, {0}_batch}}))
    return e;
"""
_DIMS = {"k": "head_dim", "v": "head_dim_v"}
_COLUMN = "  const int column = odd * 8 + lane.id % 4 / 2 * 4;  // in two pieces\n"
_STORES = "      if (n * 8 < columns)\n"


def _replace(text: str, old: str, new: str, times: int = 1) -> str:
    if text.count(old) != times:
        raise SystemExit(f"the kernel's text has changed: {text.count(old)} times {old.strip()!r}")
    return text.replace(old, new)


def changed(text: str, variant: str) -> str:
    """A kernel's source in which what is loaded, and O, are shifted by the parity of the head of k and v."""
    text = _replace(text, "  TileScheduler<C> scheduler;\n", "  TileScheduler<C> scheduler;\n  int early = 0;\n")
    text = _replace(text, "slab * 64, row", "slab * 64 - early, row", 3)
    by_pairs = "kv" if "k, v" in variant else "v" if "pairs" in variant else ""
    for name in "qkv":
        early = "row_tile.kv_head % 2 * 8"
        if name in by_pairs:
            early = f"row_tile.kv_head % 2 ? 8 - p.{_DIMS[name]} : 0"
            text = _replace(text, _MAP.format(name, _DIMS[name]), _PAIR_MAP.format(name, _DIMS[name]))
            load = f"pipelines.{name}, key, row_tile.kv_head"
            text = _replace(text, load, load + " / 2")
        begin = _LOAD.format(name, "" if name == "q" else ", int key")
        text = _replace(text, begin, f"{begin}    early = {early};\n")
    parity = "  const int early = tile.head / (p.heads / p.kv_heads) % 2 * 8;\n"
    text = _replace(text, _COLUMN, parity + _COLUMN.replace("* 4;", "* 4 - early;"))
    return _replace(text, _STORES, _STORES.replace("columns)", "columns && n * 8 + column >= 0)"))


def variants(where: target.Target) -> list[dict[str, Any]]:
    found = []
    for row in suites.suite("odd-d", where):
        if not row.name.startswith(ROWS):
            continue
        spec = choose.choose(row.problem, where).spec
        if spec is None or spec.family is not sm90_forward.FAMILY:
            raise SystemExit(f"{row.name}: dispatch picks no kernel of sm90_forward")
        config = spec.config.replace(cluster=1, pack_heads=False, splits="none")
        sources = {"plain": (config, KernelSpec(spec.family, row.problem, where, config).source)}
        sources |= {variant: (config, changed(sources["plain"][1], variant)) for variant in VARIANTS}
        paired = config.replace(cluster=2, schedule="balanced", blocks_per_sm=1)
        if spec.family.rejects(row.problem, where, paired) is None:
            sources["cluster"] = paired, KernelSpec(spec.family, row.problem, where, paired).source
        for label, (of_label, source) in sources.items():
            about = {"label": label.replace(" ", "_"), "row": row.name, "family": spec.family.name}
            found.append({**about, "config": dict(of_label), "source": source})
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    found = variants(target.known("sm_90"))
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
