"""Softmax for every NVIDIA GPU from sm_80 up, forward and backward, along rows and columns.

A team of threads has a line: a row, in vectors that lie at multiples of their size wherever the row begins, or a
column, beside others so that loads are coalesced. On Hopper a cluster of blocks may share a row. Elements that a thread
holds between the reduction and the output are read once; the rest of a longer line is read again, so that each scheme
is right at every length.
"""

from __future__ import annotations

from typing import Any

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob
from fagen.ops.softmax.problem import ITEM_BYTES, SoftmaxProblem
from fagen.target import Target

ELEMENTS = {"fp32": "float", "fp16": "half_t", "bf16": "bfloat_t"}
FLAGS = ("-O3", "-std=c++17", "-Xptxas=-v", "-lineinfo")  # no fast math: a logarithm keeps its last bits
SCHEMES = ("three_pass", "two_pass", "registers", "shared", "split")
LONGEST = 1 << 30  # of a line: places in it are 32-bit numbers

KNOBS = (
    Knob(
        "scheme", "kScheme", SCHEMES,
        "safe, a pass for the maximum of its own; online; the line held in registers or in shared memory; parts of it "
        "in several blocks, then a merge",
    ),
    Knob("threads", "kThreads", (1, 8, 32, 128, 256, 512, 1024), "threads of a row, or of a column"),
    Knob("lines", "kLines", (1, 4, 8, 32, 64, 128), "rows, or neighbouring columns, of a block"),
    Knob("vector_bytes", "kVectorBytes", (4, 8, 16), "bytes that a thread loads at once; along columns an element"),
    Knob("held", "kHeld", (1, 2, 4, 8), "vectors that a thread holds, of each input"),
    Knob("cluster", "kCluster", (1, 2, 4, 8), "blocks that share a row and what they hold of it (sm_90)"),
    Knob("fold_scale", "kFoldScale", (False, True), "log2 e and the maximum in one multiply-add"),
)  # fmt: skip

_HELD_REGISTERS = {128: 128, 256: 64, 512: 48, 1024: 16}  # that held vectors may take in blocks of so many threads


def _block_fits(p: SoftmaxProblem, t: Target, c: Config) -> str | None:
    threads = c.threads * c.lines
    if not 64 <= threads <= 1024:
        return f"a block of {c.threads} x {c.lines} = {threads} threads; useful: 64 to 1024"
    return None


def _coalesced(p: SoftmaxProblem, t: Target, c: Config) -> str | None:
    if p.along == "row":
        return f"{c.threads} thread a row is not coalesced" if c.threads < 8 else None
    if c.lines < 32 or c.threads > 32:
        return f"{c.threads} threads x {c.lines} columns; coalesced: at most 32, at least 32"
    if c.vector_bytes != 4:
        return f"a column is read by elements, so vector_bytes={c.vector_bytes} only repeats 4"
    return None


def _one_way(p: SoftmaxProblem, t: Target, c: Config) -> str | None:
    if c.scheme == "three_pass" and p.direction == "backward":
        return "backward has no maximum: scheme=three_pass only repeats two_pass"
    if c.scheme == "split" and p.along == "row" and c.lines > 1:
        return f"parts of one row fill a block, not {c.lines} rows"
    if c.scheme not in ("registers", "shared") and c.held > 1:
        return f"scheme={c.scheme} holds nothing, so held={c.held} only repeats 1"
    return None


def _one_row(p: SoftmaxProblem, t: Target, c: Config) -> str | None:
    if c.cluster == 1:
        return None
    if t.capability < 90:
        return f"clusters need sm_90, the target is {t.arch}"
    if p.along == "column" or c.lines > 1:
        return "a cluster shares one row"
    if c.scheme not in ("registers", "shared"):
        return f"a cluster holds its row, scheme={c.scheme} holds nothing"
    return None


def _folds(p: SoftmaxProblem, t: Target, c: Config) -> str | None:
    if not c.fold_scale:
        return None
    if p.direction == "backward" or p.log:
        return "a folded maximum is rounded, which cancels in the quotient of a softmax alone"
    return None if p.dtype == "fp16" else f"{p.dtype} times log2 e may be infinite; fp16 never is"


def _held_bytes(p: SoftmaxProblem, c: Config) -> int:
    """Of a thread."""
    inputs = 2 if p.direction == "backward" else 1
    return c.held * inputs * (c.vector_bytes if p.along == "row" else ITEM_BYTES[p.dtype])


def smem_bytes(p: SoftmaxProblem, c: Config) -> int:
    held = _held_bytes(p, c) * c.threads * c.lines if c.scheme == "shared" else 0
    return held + (32 if c.cluster > 1 else 0)  # two slots, by which blocks of a cluster reduce


def _smem_fits(p: SoftmaxProblem, t: Target, c: Config) -> str | None:
    need, room = smem_bytes(p, c), t.smem_per_block - 2 * 4 * 1024  # beside what the team reduces by
    return f"{need} > {room} bytes of shared memory on {t.arch}" if need > room else None


def _registers_fit(p: SoftmaxProblem, t: Target, c: Config) -> str | None:
    if c.scheme != "registers":
        return None
    threads = max(128, c.threads * c.lines)
    need, room = -(-_held_bytes(p, c) // 4), _HELD_REGISTERS[threads]
    return f"{need} > {room} registers for what a thread of {threads} holds" if need > room else None


def _supports(p: SoftmaxProblem, t: Target) -> str | None:
    if lacking := device_limits.needs_sm80(t):
        return lacking
    return f"a line has {p.length} > {LONGEST} elements" if p.length > LONGEST else None


def _derive(p: SoftmaxProblem, t: Target, c: Config) -> dict[str, int]:
    return {"block_threads": c.threads * c.lines, "smem_bytes": smem_bytes(p, c)}


def _context(p: SoftmaxProblem, c: Config) -> dict[str, Any]:
    return {"out_element": ELEMENTS[p.out_dtype]}


# ---- defaults -------------------------------------------------------------------------------------------------------


def _vectors(p: SoftmaxProblem) -> int:
    """Of 16 bytes, of a row."""
    return -(-p.length * ITEM_BYTES[p.dtype] // 16)


# the longest row of each default, in vectors of all inputs
_ROWS = {
    "quarter": 8, "half": 16, "warp": 32, "warp 2": 64, "warp 4": 128, "block": 256, "block 4": 512, "block 8": 1024,
    "wide 8": 2048, "large": 4096,
}  # fmt: skip


def _shape(p: SoftmaxProblem, t: Target) -> str:
    """What the default depends on: how long a line is, and whether lines are few."""
    if p.along == "column":
        return "column" if p.length > 64 else "short column"
    vectors = _vectors(p) * (2 if p.direction == "backward" and _vectors(p) > _ROWS["warp"] else 1)
    for name, most in _ROWS.items():
        if vectors <= most:
            return name
    return "split" if p.count < 2 * t.units else "long"


# A warp a short row, with vectors that give all of its lanes one; more vectors a lane lie in shared memory. From H100.
_WARP: dict[str, int | str] = {"threads": 32, "lines": 4, "held": 1}
_DEFAULTS: dict[str, dict[str, int | str]] = {
    "quarter": {"scheme": "registers", **_WARP, "vector_bytes": 4},
    "half": {"scheme": "registers", **_WARP, "vector_bytes": 8},
    "warp": {"scheme": "registers", **_WARP},
    "warp 2": {"scheme": "shared", **_WARP, "held": 2},
    "warp 4": {"scheme": "shared", **_WARP, "held": 4},
    "block": {"scheme": "shared", "threads": 128, "lines": 1, "held": 2},
    "block 4": {"scheme": "shared", "threads": 128, "lines": 1, "held": 4},
    "block 8": {"scheme": "shared", "threads": 128, "lines": 1, "held": 8},
    "wide 8": {"scheme": "shared", "threads": 256, "lines": 1, "held": 8},
    "large": {"scheme": "registers", "threads": 1024, "lines": 1, "held": 4},
    "long": {"scheme": "two_pass", "threads": 1024, "lines": 1, "held": 1},
    "split": {"scheme": "split", "threads": 512, "lines": 1, "held": 1},
    "short column": {"scheme": "registers", "threads": 8, "lines": 32, "held": 8, "vector_bytes": 4},
    "column": {"scheme": "registers", "threads": 32, "lines": 32, "held": 8, "vector_bytes": 4},
}


def _make(p: SoftmaxProblem, t: Target, **changes: int | str | bool) -> Config:
    """The default config with changes."""
    values = {"vector_bytes": 16, "cluster": 1, "fold_scale": False, **_DEFAULTS[_shape(p, t)]}
    if p.direction == "backward" and int(values["held"]) > 1:
        values["held"] = int(values["held"]) // 2  # of each of two inputs
    return FAMILY.config(values | changes)


def _first(p: SoftmaxProblem, t: Target) -> list[Config]:
    default = _make(p, t)
    changes: list[dict[str, int | str | bool]] = [
        {"scheme": "two_pass", "held": 1}, {"scheme": "three_pass", "held": 1}, {"fold_scale": True},
        {"scheme": "registers", "vector_bytes": 8}, {"scheme": "registers"}, {"scheme": "shared", "held": 4},
        {"threads": 128, "lines": 1}, {"threads": 256, "lines": 1}, {"threads": 512, "lines": 1},
        {"scheme": "registers", "threads": 1024, "lines": 1, "held": 4, "cluster": 4},
        {"scheme": "registers", "threads": 512, "lines": 1, "held": 4, "cluster": 8},
        {"threads": 256, "lines": 1, "scheme": "split", "held": 1},
    ]  # fmt: skip
    tried = [_make(p, t, **change) for change in changes]
    return [c for c in dict.fromkeys(tried) if c != default and FAMILY.rejects(p, t, c) is None]


FAMILY = Family(
    name="simt_softmax",
    template="rowwise/softmax.cu.j2",
    op="softmax",
    dtypes=("fp16", "bf16", "fp32"),
    knobs=KNOBS,
    constraints=(
        Constraint("block_fits", _block_fits, ("threads", "lines")),
        Constraint("coalesced", _coalesced, ("threads", "lines", "vector_bytes")),
        Constraint("one_way", _one_way, ("scheme", "lines", "held")),
        Constraint("one_row", _one_row, ("scheme", "lines", "cluster")),
        Constraint("folds", _folds, ("fold_scale",)),
        Constraint("registers_fit", _registers_fit),
        Constraint("smem_fits", _smem_fits),
    ),
    supports=_supports,
    derive=_derive,
    default=_make,
    default_reads=_shape,
    flags=lambda t: (device_limits.gencode(t), *FLAGS),
    context=_context,
    first_configs=_first,
)
