"""Forward for any CPU: OpenMP, vectors as wide as the machine's, accumulation in float32.

Queries lie along the lanes of vectors, so k and v are read as they lie, one element at a time and broadcast; no
product needs a transposed operand and the softmax needs no sum across lanes.
"""

from __future__ import annotations

from fagen.families.base import Config, Constraint, Family, Knob
from fagen.families.cost import makespan, vector_lanes, walk
from fagen.families.reads import nothing
from fagen.ops.attention.problem import Problem
from fagen.target import Target

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions")

KNOBS = (
    Knob("tile_m", "kTileM", (32, 48, 64, 96, 128), "rows of q that share each tile of k and v"),
    Knob("tile_n", "kTileN", (64, 128, 256), "keys of a tile"),
    Knob("loop_order", "kLoopOrder", ("q_outer", "kv_outer"), "whose tiles the outer loop walks"),
    Knob("schedule", "kSchedule", ("blocked", "dynamic", "longest"), "how threads share tiles of rows"),
    Knob("block_rows", "kBlockRows", (4, 6, 8, 12), "keys, or columns of v, of a register block"),
    Knob("block_vectors", "kBlockVectors", (2, 3, 4), "vectors of queries of a register block"),
    Knob("packing", "kPacking", ("direct", "tile", "head"), "k and v as contiguous float32; once a visit, once a head"),
)

LANES = 16  # of the widest vector; tiles are whole vectors of it, so that a config is right on every machine
VECTOR_REGISTERS = {"avx512": 32, "neon": 32}  # the others have 16
SCRATCH_BYTES = 512 << 10  # half of an L2, and a quarter of the smallest usual stack of a thread


def _block_registers(c: Config) -> int:
    """Sums, a row of queries, and one broadcast."""
    return c.block_rows * c.block_vectors + c.block_vectors + 1


def _scratch_bytes(p: Problem, c: Config) -> int:
    """A thread's scores, its packed keys and values, and the state of its rows: `Scratch` in layout.h."""
    d, dv = p.head_dim_padded, p.head_dim_v_padded
    group = LANES * c.block_vectors
    keys = c.tile_n if c.packing == "tile" else 1
    rows = c.tile_m if c.loop_order == "q_outer" else group
    floats = c.tile_n * group + keys * (d + dv + 2 * LANES) + rows * (d + dv + 2)
    return -(-4 * floats // 64) * 64


def whole_groups(p: Problem, t: Target, c: Config) -> str | None:
    if c.tile_m % (LANES * c.block_vectors):
        return f"tile_m {c.tile_m} is no multiple of {LANES} lanes x {c.block_vectors} vectors"
    return None


def block_fits(p: Problem, t: Target, c: Config) -> str | None:
    have, need = VECTOR_REGISTERS.get(t.simd, 16), _block_registers(c)
    if not have // 2 < need <= have:
        return f"a {c.block_rows} x {c.block_vectors} block takes {need} of {have} registers; useful: more than half"
    return None


def _scratch_fits(p: Problem, t: Target, c: Config) -> str | None:
    need = _scratch_bytes(p, c)
    return f"{need} > {SCRATCH_BYTES} bytes of scratch a thread" if need > SCRATCH_BYTES else None


def direct_floats(p: Problem, t: Target, c: Config) -> str | None:
    if c.packing == "direct" and p.dtype != "fp32":
        return f"{p.dtype} has to be packed into float32"
    return None


def _order_matters(p: Problem, t: Target, c: Config) -> str | None:
    if c.schedule == "longest" and p.mask == "none":
        return "without a mask all tiles of rows are equally long"
    return None


def _one_scheme(p: Problem, t: Target, c: Config) -> str | None:
    if c.loop_order == "q_outer":
        return None
    group = LANES * c.block_vectors
    if c.tile_m != group:
        return f"kv_outer takes all rows, one block of {group} at a time; tile_m={c.tile_m} only repeats another"
    if c.packing == "head":
        return "kv_outer visits a tile of keys once a head, so packing=head only repeats tile"
    if c.schedule == "longest":
        return "kv_outer shares whole heads, schedule=longest only repeats dynamic"
    return None


def _supports(p: Problem, t: Target) -> str | None:
    if t.is_gpu:
        return f"needs a CPU, the target is {t.arch}"
    return None


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    d, dv = p.head_dim_padded, p.head_dim_v_padded
    return {"tile_bytes": 4 * c.tile_m * (d + dv + 2), "scratch_bytes": _scratch_bytes(p, c)}


def _make(p: Problem, t: Target, **changes: int | str) -> Config:
    """The default config with changes."""
    vectors = 4 if t.simd in VECTOR_REGISTERS else 2
    values: dict[str, int | str] = {
        "tile_m": 64, "tile_n": 256, "loop_order": "q_outer", "schedule": "dynamic",
        "block_rows": 6, "block_vectors": vectors, "packing": "direct",
    }  # fmt: skip
    if p.dtype != "fp32":  # a packed tile pays when more rows share it
        large = p.head_dim_padded + p.head_dim_v_padded > 256
        values |= {"tile_m": 128, "tile_n": 64 if large else 128, "packing": "tile"}
    if p.head_dim_padded + p.head_dim_v_padded > 512:  # what a thread holds of its rows must fit in its scratch
        packing = values["packing"] if p.dtype == "fp32" else "head"
        rows = 12 if t.simd in VECTOR_REGISTERS else 6
        values |= {"tile_m": 32, "tile_n": 128, "block_rows": rows, "block_vectors": 2, "packing": packing}
    return FAMILY.config(values | changes)


def _seeds(p: Problem, t: Target) -> list[Config]:
    vectors = 4 if t.simd in VECTOR_REGISTERS else 2
    candidates = [
        _make(p, t, schedule="longest"),
        _make(p, t, tile_n=128, packing="tile", tile_m=128),
        _make(p, t, tile_n=128, packing="head"),
        _make(p, t, tile_n=128, packing="tile", loop_order="kv_outer", tile_m=LANES * vectors),
    ]
    if vectors == 4:
        candidates.append(_make(p, t, tile_n=128, tile_m=96, block_rows=8, block_vectors=3))
    default = _make(p, t)
    return [c for c in candidates if c != default and FAMILY.rejects(p, t, c) is None]


def cost(p: Problem, t: Target, c: Config) -> float:
    """Vector operations, roughly: a block's products and the loads that feed them, the softmax, rescaling O once a
    tile, packing, threads that wait for the last one."""
    d, dv, m, n = p.head_dim_padded, p.head_dim_v_padded, int(c.tile_m), int(c.tile_n)
    rows, vectors = int(c.block_rows), int(c.block_vectors)
    lanes = vector_lanes(t)
    feed = 1 + 0.5 * (1 / rows + 1 / vectors) / 2 + max(0.0, 10 - rows * vectors) / 10
    seen = walk(p, m, n)
    whole = p.seqlen_q / (seen.row_tiles * m)  # the last tile of rows may be less
    cells = (seen.visits - 0.45 * seen.masked) * m * n * whole / lanes  # of a masked tile only what is seen
    work = cells * ((d + dv) * feed + 14) + seen.visits * m * whole * dv / lanes * 2
    moved = (d + dv) * p.seqlen_k / lanes * 8
    if c.packing == "tile":
        work += moved * (1 if c.loop_order == "kv_outer" else seen.visits / max(1, -(-p.seqlen_k // n)))
    elif c.packing == "head":
        work += moved * p.heads / p.kv_heads
    if c.loop_order == "kv_outer":
        work += seen.visits * m * (d + dv) / lanes
    heads, pieces = p.batch * p.heads, p.batch * p.heads * (seen.row_tiles if c.loop_order == "q_outer" else 1)
    longest = work * (seen.most / max(1, seen.visits) if c.loop_order == "q_outer" else 1)
    tail = 0.2 if c.schedule == "longest" else 0.5 if c.schedule == "dynamic" else 0.9
    return makespan(heads * work, longest, pieces, t.units, tail)


FAMILY = Family(
    name="cpu_forward",
    template="cpu/forward.cpp.j2",
    op="forward",
    dtypes=("fp32", "bf16", "fp16"),
    knobs=KNOBS,
    constraints=(
        Constraint("whole_groups", whole_groups),
        Constraint("block_fits", block_fits),
        Constraint("direct_floats", direct_floats),
        Constraint("order_matters", _order_matters),
        Constraint("one_scheme", _one_scheme),
        Constraint("scratch_fits", _scratch_fits),
    ),
    supports=_supports,
    derive=_derive,
    default=_make,
    default_reads=nothing,
    flags=lambda t: FLAGS,
    first_configs=_seeds,
    cost=cost,
    resources=lambda p, t, c: (_scratch_bytes(p, c),),
)
