"""Backward for every NVIDIA GPU from sm_80 up in plain float32: FMAs on rectangles in registers, no tensor cores.

One pass a gradient, with S and dP computed anew in each: eight products where five would do. But blocks add nothing to
what others compute, so that the bits are the same each time; and shared memory does not grow with the head dims.
"""

from __future__ import annotations

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.families.cost import makespan, walk
from fagen.families.reads import nothing
from fagen.families.simt_forward import FLAGS, REGISTERS_PER_SM
from fagen.ops.attention.problem import SIMT_SERVES, Problem
from fagen.target import Target

KNOBS = (
    Knob("tile_own", "kTileOwn", (32, 64, 128), "rows of its gradient a block computes"),
    Knob("tile_other", "kTileOther", (32, 64, 128), "rows of the other side a block visits at a time"),
    Knob("warps", "kWarps", (2, 4, 8), "warps of a block"),
    Knob("cell_rows", "kCellRows", (4, 8), "rows of a thread's rectangles of S and dP"),
    Knob("sum_rows", "kSumRows", (4, 8), "rows of a thread's rectangle of the gradient"),
    Knob("chunk_d", "kChunkD", (16, 32, 64), "columns of both tiles that are loaded at a time"),
    Knob("chunk_rows", "kChunkRows", (4, 8, 16, 32, 64), "rows of the other side that are loaded at a time"),
    Knob("stages", "kStages", (2, 3), "chunks in shared memory"),
    Knob("copies", "kCopies", ("cp_async", "registers"), "the way to shared memory; registers convert 16 bits"),
    Knob("blocks_per_sm", "kBlocksPerSm", (1, 2, 3, 4), "blocks the register budget is cut for"),
)  # fmt: skip

OTHER_REGISTERS = 48  # addresses, stats of rows, loop state: what a thread needs beside its rectangles
_LARGEST_CHUNK = 32 << 10  # bytes


def _lanes(c: Config, rows: int) -> int:
    """Threads that share a thread's rows."""
    return 32 * int(c.warps) * rows // int(c.tile_own)


def _cell_columns(c: Config) -> int:
    return int(c.tile_other) // max(1, _lanes(c, int(c.cell_rows)))


def _quads(columns: int, c: Config) -> int:
    """Groups of four columns of a gradient of a thread."""
    return -(-columns // (4 * max(1, _lanes(c, int(c.sum_rows)))))


def _stage_floats(columns: int, c: Config) -> tuple[int, int]:
    """Of a chunk of columns of both tiles, and of one of whole rows."""
    pair = (int(c.tile_own) + int(c.tile_other)) * (int(c.chunk_d) + 4)
    return pair, int(c.chunk_rows) * _quads(columns, c) * 4 * _lanes(c, int(c.sum_rows))


def smem_bytes(columns: int, c: Config) -> int:
    """Of the pass for a gradient of so many columns."""
    return 4 * (c.stages * max(_stage_floats(columns, c)) + c.tile_own * (c.tile_other + 8))


def _columns(p: Problem) -> int:
    return max(p.head_dim_padded, p.head_dim_v_padded)


def rectangle_registers(p: Problem, c: Config) -> int:
    """The gradient; S and dP with their operands, or the operands of the gradient alone; pieces on their way."""
    rows, columns, of_sum, quads = int(c.cell_rows), _cell_columns(c), int(c.sum_rows), _quads(_columns(p), c)
    parts = 3 if _columns(p) > 256 else 2  # long sums are made of short ones
    held = sum(_stage_floats(_columns(p), c)) // (32 * int(c.warps)) if c.copies == "registers" else 0
    held = held * p.itemsize // 4 if p.aligned else held
    return of_sum * quads * 4 + max(parts * rows * columns + 4 * rows + 4, 4 * of_sum + 4) + held


def register_limit(c: Config) -> int:
    return min(255, REGISTERS_PER_SM // (32 * int(c.warps) * int(c.blocks_per_sm)) // 8 * 8)


def _even_cells(p: Problem, t: Target, c: Config) -> str | None:
    lanes = _lanes(c, int(c.cell_rows))
    if not 4 <= lanes <= 32:
        return f"{lanes} threads share {c.cell_rows} rows of S; 4 to 32 can"
    if not 2 <= _cell_columns(c) <= 8:
        return f"{lanes} threads share {c.tile_other} columns of S: {_cell_columns(c)} each, not 2 to 8"
    return None


def _even_columns(p: Problem, t: Target, c: Config) -> str | None:
    lanes, columns = _lanes(c, int(c.sum_rows)), _columns(p)
    if lanes < 2:
        return f"{c.warps} warps cannot share {c.tile_own} rows, {c.sum_rows} each"
    if lanes > 8 and 2 * columns <= 4 * lanes:
        return f"{lanes} threads share {columns} columns, four each: half of them have none"
    return None


def _chunks_fit(p: Problem, t: Target, c: Config) -> str | None:
    if c.chunk_d > 16 and c.chunk_d >= 2 * _columns(p):
        return f"chunk_d {c.chunk_d} is twice the head dim {_columns(p)}"
    if c.chunk_rows > c.tile_other:
        return f"chunk_rows {c.chunk_rows} > tile_other {c.tile_other}"
    pair, rows = _stage_floats(_columns(p), c)
    if max(pair, rows) * 4 > _LARGEST_CHUNK and c.chunk_rows > 4:
        return f"a chunk of {max(pair, rows) * 4} bytes, at most {_LARGEST_CHUNK}"
    if c.chunk_rows < min(c.tile_other, 64) and 2 * rows <= pair:
        return f"a chunk of rows takes {rows * 4} of {pair * 4} bytes: twice as many rows fit"
    return None


def _copies_convert(p: Problem, t: Target, c: Config) -> str | None:
    if c.copies == "cp_async" and p.dtype != "fp32":
        return f"cp.async copies {p.dtype} as it is"
    if c.copies == "registers" and c.stages > 2:
        return f"registers hold one chunk, stages={c.stages} only repeats 2"
    return None


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.smem_fits(smem_bytes(_columns(p), c), t, c)


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.registers_fit(rectangle_registers(p, c) + OTHER_REGISTERS, register_limit(c), c)


def _supports(p: Problem, t: Target) -> str | None:
    return device_limits.needs_sm80(t)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"smem_bytes": smem_bytes(p.head_dim_padded, c), "dv_smem_bytes": smem_bytes(p.head_dim_v_padded, c)}


def _make(**values: Value) -> Config:
    base: dict[str, Value] = {
        "tile_own": 64, "tile_other": 64, "warps": 4, "cell_rows": 8, "sum_rows": 8, "chunk_d": 32, "chunk_rows": 32,
        "stages": 2, "copies": "cp_async", "blocks_per_sm": 1,
    }  # fmt: skip
    return Config({**base, **values})


# Good guesses by head dim, the best first. The last ones fit everywhere.
_GUESSES = (
    (16, [_make(tile_own=128, sum_rows=4, chunk_d=16, chunk_rows=64, blocks_per_sm=2)]),
    (32, [_make(sum_rows=4, chunk_rows=64, blocks_per_sm=2)]),
    (64, [_make(chunk_rows=64, blocks_per_sm=2), _make(chunk_rows=64)]),
    (128, [_make(chunk_rows=32, blocks_per_sm=2), _make(chunk_rows=16)]),
    (256, [_make(warps=8, cell_rows=4, chunk_rows=16), _make(warps=8, cell_rows=4, chunk_rows=8)]),
    (
        512,
        [
            _make(tile_other=32, warps=8, cell_rows=4, chunk_rows=8),
            _make(tile_own=32, warps=8, cell_rows=4, chunk_rows=8),
        ],
    ),
)
_WIDEST = [
    _make(tile_own=32, tile_other=64, warps=8, cell_rows=4, chunk_rows=8),
    _make(tile_own=32, tile_other=64, warps=8, cell_rows=4, chunk_rows=4),
]
_SMALLEST = [
    _make(chunk_d=depth, chunk_rows=rows, tile_own=own, cell_rows=4, sum_rows=sums, warps=warps)
    for warps, own in ((4, 64), (8, 64), (8, 32), (4, 128))
    for sums in (4, 8)
    for depth in (32, 16)
    for rows in (64, 32, 16, 8, 4)
]


def _guesses(p: Problem, t: Target) -> list[Config]:
    """The legal ones of the table."""
    copies = "cp_async" if p.dtype == "fp32" else "registers"
    table = next((guesses for limit, guesses in _GUESSES if _columns(p) <= limit), _WIDEST)
    shaped = [c.replace(copies=copies) for c in (*table, *_WIDEST, *_SMALLEST)]
    return [c for c in dict.fromkeys(shaped) if not any(k.check(p, t, c) for k in CONSTRAINTS)]


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare: nobody has looked at its spills for this very problem and GPU."""
    spare = OTHER_REGISTERS + (30 if p.mask == "intervals" else 0) + (20 if p.softcap or p.alibi else 0)
    spare += (20 if p.dropout else 0) + (0 if p.dtype == "fp32" else 20 if p.aligned else 50)
    guesses = _guesses(p, t)
    roomy = (c for c in guesses if rectangle_registers(p, c) + spare <= register_limit(c))
    return next(roomy, min(guesses, key=lambda c: rectangle_registers(p, c) - register_limit(c)))


def _resources(p: Problem, t: Target, c: Config) -> tuple:
    return (smem_bytes(_columns(p), c), c.warps, rectangle_registers(p, c))


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: FMAs against what they read of shared memory, exponentials, barriers, the tail."""
    d, dv = p.head_dim_padded, p.head_dim_v_padded
    own, other, warps, blocks = int(c.tile_own), int(c.tile_other), int(c.warps), int(c.blocks_per_sm)
    rows, columns, of_sum = int(c.cell_rows), _cell_columns(c), int(c.sum_rows)

    def loads(lanes: int, of_rows: float, of_columns: float) -> float:
        return of_rows * (1 if lanes >= 32 else 1.5) + of_columns * (4 if lanes >= 32 else 2)

    depth = 3 * d + 2 * dv  # of S and dP in all passes; 2 d + dv columns are summed
    quads = 2 * _quads(d, c) + _quads(dv, c)
    fmas = warps * (rows * columns * depth + of_sum * quads * 4 * other) / 4
    read = warps * loads(_lanes(c, rows), rows, columns) * depth / 4
    read += warps * (3 * loads(_lanes(c, of_sum), of_sum, 0) + loads(_lanes(c, of_sum), 0, 4 * quads)) * other / 4
    hidden = min(1.0, warps * blocks / 16)
    cells = warps * rows * columns * 3 * 12 / 4
    busy = max(fmas, read) + (1 - 0.6 * hidden) * (min(fmas, read) + cells) + hidden * 0.5 * cells
    chunks = depth / int(c.chunk_d) + 3 * other // int(c.chunk_rows)
    moved = sum(_stage_floats(_columns(p), c)) * chunks / 2 / 128
    visit = busy + chunks * (120 if c.stages == 2 else 100) / blocks + moved * (1 if c.copies == "cp_async" else 3)
    if rectangle_registers(p, c) + 60 > register_limit(c):
        visit *= 1.1
    seen, heads = walk(p, own, other), p.batch * p.heads
    work = heads * (seen.visits * visit + seen.row_tiles * 9000 / blocks)
    return makespan(work, seen.most * visit, heads * seen.row_tiles, t.units, 0.2)


_SHAPE = ("tile_own", "tile_other", "warps", "cell_rows")
_STAGE = ("tile_own", "tile_other", "warps", "sum_rows", "chunk_d", "chunk_rows")
CONSTRAINTS = (
    Constraint("even_cells", _even_cells, _SHAPE),
    Constraint("even_columns", _even_columns, ("tile_own", "warps", "sum_rows")),
    Constraint("chunks_fit", _chunks_fit, _STAGE),
    Constraint("copies_convert", _copies_convert, ("stages", "copies")),
    Constraint("smem_fits", _smem_fits, (*_STAGE, "stages", "blocks_per_sm")),
    Constraint("registers_fit", _registers_fit, (*_STAGE, "cell_rows", "copies", "blocks_per_sm")),
)

FAMILY = Family(
    name="simt_backward",
    template="simt/backward.cu.j2",
    op="backward",
    dtypes=("fp32", "fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=_default,
    default_reads=nothing,
    flags=lambda t: (device_limits.gencode(t), *FLAGS),
    first_configs=lambda p, t: _guesses(p, t)[1:4],
    cost=cost,
    last_resort=True,
    serves_calls=lambda p: p.dtype in SIMT_SERVES,
    resources=_resources,
)
