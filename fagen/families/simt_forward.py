"""Forward for every NVIDIA GPU from sm_80 up in plain float32: FMAs on rectangles in registers, no tensor cores.

Any head dims from 1 to 1024, any dtype (16 bits are turned to float32 on the way to shared memory), any alignment. What
is in shared memory does not grow with the head dims, if q is loaded anew with every chunk of K.
"""

from __future__ import annotations

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.families.cost import key_bytes, makespan, walk
from fagen.families.reads import nothing
from fagen.ops.attention.problem import SIMT_SERVES, Problem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "-Xptxas=-v", "-lineinfo")  # no fast math: its tanh and division are of 16 bits' accuracy

KNOBS = (
    Knob("tile_m", "kTileM", (32, 64, 128), "rows of q a block works on"),
    Knob("tile_n", "kTileN", (32, 64, 128), "keys of a tile"),
    Knob("warps", "kWarps", (2, 4, 8), "warps of a block"),
    Knob("score_rows", "kScoreRows", (4, 8), "rows of a thread's rectangle of S"),
    Knob("output_rows", "kOutputRows", (4, 8), "rows of a thread's rectangle of O"),
    Knob("chunk_d", "kChunkD", (16, 32, 64), "columns of K that are loaded at a time"),
    Knob("chunk_keys", "kChunkKeys", (4, 8, 16, 32, 64), "rows of V that are loaded at a time"),
    Knob("stages", "kStages", (2, 3), "chunks in shared memory"),
    Knob("q_source", "kQSource", ("resident", "streamed"), "q in shared memory, or loaded anew with each chunk of K"),
    Knob(
        "copies",
        "kCopies",
        ("cp_async", "registers"),
        "their way to shared memory; 16 bits turn to float32 in registers",
    ),
    Knob("blocks_per_sm", "kBlocksPerSm", (1, 2, 3, 4), "blocks the register budget is cut for"),
    Knob(
        "block_order",
        "kBlockOrder",
        ("ascending", "descending", "longest_first", "sectioned"),
        "order of row tiles and heads",
    ),
)

REGISTERS_PER_SM = 65536
OTHER_REGISTERS = 36  # addresses, maxima and sums, loop state: what a thread needs beside its rectangles
_LARGEST_CHUNK = 32 << 10  # bytes


def _lanes(c: Config, rows: int) -> int:
    """Threads that share a thread's rows."""
    return 32 * int(c.warps) * rows // int(c.tile_m)


def _score_keys(c: Config) -> int:
    return int(c.tile_n) // max(1, _lanes(c, int(c.score_rows)))


def _quads(p: Problem, c: Config) -> int:
    """Groups of four columns of O of a thread."""
    return -(-p.head_dim_v_padded // (4 * max(1, _lanes(c, int(c.output_rows)))))


def _stage_floats(p: Problem, c: Config) -> tuple[int, int]:
    """Of a chunk of K, with q where that passes by as well, and of one of V."""
    rows = int(c.tile_n) + (int(c.tile_m) if c.q_source == "streamed" else 0)
    width = _quads(p, c) * 4 * _lanes(c, int(c.output_rows))
    return rows * (int(c.chunk_d) + 4), int(c.chunk_keys) * width


def smem_bytes(p: Problem, c: Config) -> int:
    q = 0 if c.q_source == "streamed" else c.tile_m * (p.head_dim_padded + 4)
    return 4 * (q + c.stages * max(_stage_floats(p, c)) + c.tile_m * (c.tile_n + 8) + 2 * c.tile_m)


def rectangle_registers(p: Problem, c: Config) -> int:
    """O; S with its operands, or the operands of O alone; pieces on their way to shared memory."""
    rows, keys, of_o, quads = int(c.score_rows), _score_keys(c), int(c.output_rows), _quads(p, c)
    parts = 2 if p.head_dim_padded > 256 else 1  # long sums are made of short ones
    held = sum(_stage_floats(p, c)) // (32 * int(c.warps)) if c.copies == "registers" else 0
    held = held * p.itemsize // 4 if p.aligned else held
    return of_o * quads * 4 + max(parts * rows * keys + 4 * rows + 4, 4 * of_o + 4) + held


def register_limit(c: Config) -> int:
    return min(255, REGISTERS_PER_SM // (32 * int(c.warps) * int(c.blocks_per_sm)) // 8 * 8)


def _even_share(p: Problem, t: Target, c: Config) -> str | None:
    lanes = _lanes(c, int(c.score_rows))
    if lanes not in (8, 16, 32):
        return f"{lanes} threads share {c.score_rows} rows of S; 8, 16 or 32 can, which are of one warp"
    if _score_keys(c) < 2:
        return f"{lanes} threads share {c.tile_n} keys: less than 2 each"
    return None


def _even_columns(p: Problem, t: Target, c: Config) -> str | None:
    lanes, columns = _lanes(c, int(c.output_rows)), p.head_dim_v_padded
    if lanes < 2:
        return f"{c.warps} warps cannot share {c.tile_m} rows, {c.output_rows} each"
    if lanes > 8 and _quads(p, c) == 1 and 2 * columns <= 4 * lanes:
        return f"{lanes} threads share {columns} columns of v, four each: half of them have none"
    return None


def _chunks_fit(p: Problem, t: Target, c: Config) -> str | None:
    if c.chunk_d > 16 and c.chunk_d >= 2 * p.head_dim_padded:
        return f"chunk_d {c.chunk_d} is twice head_dim {p.head_dim_padded}"
    if c.chunk_keys > c.tile_n:
        return f"chunk_keys {c.chunk_keys} > tile_n {c.tile_n}"
    of_k, of_v = _stage_floats(p, c)
    if max(of_k, of_v) * 4 > _LARGEST_CHUNK and c.chunk_keys > 4:
        return f"a chunk of {max(of_k, of_v) * 4} bytes, at most {_LARGEST_CHUNK}"
    # a stage is as large as the larger one: a chunk of V that could be twice as long only costs barriers
    if c.chunk_keys < c.tile_n and 2 * of_v <= of_k and c.chunk_keys < 64:
        return f"a chunk of V takes {of_v * 4} of {of_k * 4} bytes: twice as many keys fit"
    return None


def _q_somewhere(p: Problem, t: Target, c: Config) -> str | None:
    if c.q_source == "streamed" and p.head_dim_padded <= 128:
        return f"q of head_dim {p.head_dim_padded} fits in shared memory"
    return None


def _copies_convert(p: Problem, t: Target, c: Config) -> str | None:
    if c.copies == "cp_async" and p.dtype != "fp32":
        return f"cp.async copies {p.dtype} as it is"
    return None


def _stages_pay(p: Problem, t: Target, c: Config) -> str | None:
    if c.copies == "registers" and c.stages > 2:
        return f"registers hold one chunk, stages={c.stages} only repeats 2"
    return None


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.smem_fits(smem_bytes(p, c), t, c)


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.registers_fit(rectangle_registers(p, c) + OTHER_REGISTERS, register_limit(c), c)


def _supports(p: Problem, t: Target) -> str | None:
    return device_limits.needs_sm80(t)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"smem_bytes": smem_bytes(p, c)}


def _make(**values: Value) -> Config:
    base: dict[str, Value] = {
        "tile_m": 64, "tile_n": 64, "warps": 4, "score_rows": 8, "output_rows": 8, "chunk_d": 32, "chunk_keys": 32,
        "stages": 2, "q_source": "resident", "copies": "cp_async", "blocks_per_sm": 1, "block_order": "ascending",
    }  # fmt: skip
    return Config({**base, **values})


# Good guesses by head dim, the best first; the first legal one is the default. The last ones fit everywhere.
_GUESSES = (
    (
        16,
        [
            _make(tile_m=128, output_rows=4, chunk_d=16, chunk_keys=64, blocks_per_sm=3),
            _make(tile_m=128, output_rows=4, chunk_d=16, chunk_keys=64, blocks_per_sm=2),
        ],
    ),
    (
        32,
        [
            _make(tile_m=128, chunk_keys=64, blocks_per_sm=2),
            _make(tile_m=128, chunk_keys=64, blocks_per_sm=3),
            _make(output_rows=4, chunk_keys=64),
        ],
    ),
    (
        64,
        [
            _make(tile_m=128, warps=8, blocks_per_sm=2),
            _make(tile_m=128, blocks_per_sm=2),
            _make(blocks_per_sm=4),
            _make(blocks_per_sm=3),
            _make(),
        ],
    ),
    (
        128,
        [
            _make(chunk_keys=16, blocks_per_sm=3),
            _make(chunk_keys=16, blocks_per_sm=2),
            _make(tile_m=128, warps=8, chunk_keys=16),
            _make(chunk_keys=16),
        ],
    ),
    (
        256,
        [
            _make(warps=8, score_rows=4, chunk_keys=8, blocks_per_sm=2),
            _make(warps=8, score_rows=4, chunk_keys=8),
            _make(warps=8, tile_n=128, score_rows=4, chunk_keys=16),
        ],
    ),
    (
        512,
        [
            _make(warps=8, score_rows=4, chunk_keys=8, q_source="streamed"),
            _make(warps=8, tile_n=128, score_rows=4, chunk_keys=8, q_source="streamed"),
        ],
    ),
)
_WIDEST = [
    _make(tile_m=32, tile_n=128, warps=8, score_rows=4, chunk_keys=4, q_source="streamed"),
    _make(tile_m=32, warps=4, score_rows=4, chunk_keys=8, q_source="streamed"),
]
_SMALLEST = [
    _make(chunk_d=depth, chunk_keys=keys, tile_m=m, score_rows=s, output_rows=o, warps=warps, q_source=q)
    for q in ("resident", "streamed")
    for warps, m, s in ((4, 64, 4), (2, 64, 8), (8, 64, 4), (8, 32, 4))
    for o in (4, 8)
    for depth in (32, 16)
    for keys in (64, 32, 16, 8, 4)
]


def _guesses(p: Problem, t: Target) -> list[Config]:
    """The legal ones of the table."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    order = "ascending" if p.mask == "none" else "longest_first"
    copies = "cp_async" if p.dtype == "fp32" else "registers"
    table = next((guesses for limit, guesses in _GUESSES if size <= limit), _WIDEST)
    shaped = [c.replace(block_order=order, copies=copies) for c in (*table, *_WIDEST, *_SMALLEST)]
    return [c for c in dict.fromkeys(shaped) if not any(k.check(p, t, c) for k in CONSTRAINTS)]


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare: nobody has looked at its spills for this very problem and GPU."""
    spare = OTHER_REGISTERS + (30 if p.mask == "intervals" else 0) + (30 if p.softcap or p.alibi else 0)
    spare += (60 if p.dropout else 0) + (0 if p.dtype == "fp32" else 50)
    guesses = _guesses(p, t)
    roomy = (c for c in guesses if rectangle_registers(p, c) + spare <= register_limit(c))
    return next(roomy, min(guesses, key=lambda c: rectangle_registers(p, c) - register_limit(c)))


def _resources(p: Problem, t: Target, c: Config) -> tuple:
    return (smem_bytes(p, c), c.warps, rectangle_registers(p, c))


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: FMAs against what they read of shared memory, the softmax, barriers that few warps cannot
    hide, the tail. A load of 16 bytes a thread takes a warp two cycles, or four where all its threads read others."""
    d, m, n, warps = p.head_dim_padded, int(c.tile_m), int(c.tile_n), int(c.warps)
    rows, keys, of_o, quads = int(c.score_rows), _score_keys(c), int(c.output_rows), _quads(p, c)
    blocks = int(c.blocks_per_sm)

    def loads(lanes: int, of_rows: float, of_columns: float) -> float:
        return of_rows * (1 if lanes >= 32 else 1.5) + of_columns * (4 if lanes >= 32 else 2)

    lanes_s, lanes_o = _lanes(c, rows), _lanes(c, of_o)
    fmas = warps * (rows * keys * d + of_o * quads * 4 * n) / 4
    read = warps * (loads(lanes_s, rows, keys) * d / 4 + loads(lanes_o, of_o, 4 * quads) * n / 4)
    softmax = warps * rows * (keys * 10 + 30) / 4 + warps * of_o * quads
    hidden = min(1.0, warps * blocks / 16)
    busy = max(fmas, read) + (1 - 0.6 * hidden) * (min(fmas, read) + softmax) + hidden * 0.5 * softmax
    chunks = -(-d // int(c.chunk_d)) + n // int(c.chunk_keys)
    moved = sum(_stage_floats(p, c)) * chunks / 2 / 128
    visit = busy + chunks * (120 if c.stages == 2 else 100) / blocks + moved * (1 if c.copies == "cp_async" else 3)
    if rectangle_registers(p, c) + 48 > register_limit(c):
        visit *= 1.1
    seen, heads = walk(p, m, n), p.batch * p.heads
    boundary = 3000 / blocks + m * (d + p.head_dim_v_padded) * p.itemsize / 24
    work = heads * (seen.visits * visit + seen.masked * m * n * 0.05 + seen.row_tiles * boundary)
    longest = seen.most * visit + boundary
    uneven = seen.most * seen.row_tiles > seen.visits
    tail = 0.15 if not uneven or c.block_order in ("longest_first", "sectioned") else 0.7
    total = makespan(work, longest, heads * seen.row_tiles, t.units, tail)
    return total * (1.02 if c.block_order == "longest_first" and key_bytes(p) > t.l2 else 1)


_SHAPE = ("tile_m", "tile_n", "warps", "score_rows")
_OUTPUT = ("tile_m", "warps", "output_rows")
_STAGE = ("tile_m", "tile_n", "warps", "output_rows", "chunk_d", "chunk_keys", "q_source")
CONSTRAINTS = (
    Constraint("even_share", _even_share, _SHAPE),
    Constraint("even_columns", _even_columns, _OUTPUT),
    Constraint("q_somewhere", _q_somewhere, ("q_source",)),
    Constraint("chunks_fit", _chunks_fit, _STAGE),
    Constraint("copies_convert", _copies_convert, ("copies",)),
    Constraint("stages_pay", _stages_pay, ("stages", "copies")),
    Constraint("order_matters", device_limits.order_matters, ("block_order",)),
    Constraint("smem_fits", _smem_fits, (*_STAGE, "stages", "blocks_per_sm")),
    Constraint("registers_fit", _registers_fit, (*_STAGE, "score_rows", "copies", "blocks_per_sm")),
)

FAMILY = Family(
    name="simt_forward",
    template="simt/forward.cu.j2",
    op="forward",
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
