"""Backward in float32 on the tensor cores of every NVIDIA GPU from sm_80 up: tf32 products by mma.sync, cp.async.

An operand is the sum of two tf32 numbers, so that three products give float32's own accuracy. Blocks own keys, in one
pass for dK and dV or one for each. They add their parts of dQ; or dQ has a pass of its own, with S and dP computed
anew, and blocks add nothing to what others compute: the same bits each time. Head dims from 1 to 256, any alignment.
"""

from __future__ import annotations

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.families.cost import makespan, walk
from fagen.families.reads import nothing
from fagen.families.sm80_forward_fp32 import FLAGS, register_limit
from fagen.ops.attention.problem import Problem
from fagen.target import Target

KNOBS = (
    Knob("tile_m", "kTileM", (16, 32, 64), "dK and dV: rows of q that pass by at a time"),
    Knob("tile_n", "kTileN", (32, 64, 128, 256), "dK and dV: keys a block works on"),
    Knob("dq_route", "kDqRoute", ("own_pass", "atomics"), "dQ in a pass of its own, or by float32 additions"),
    Knob("dq_tile_m", "kDqTileM", (32, 64, 128, 256), "own_pass: rows a block works on"),
    Knob("dq_tile_n", "kDqTileN", (16, 32, 64), "own_pass: keys that pass by at a time"),
    Knob("warps", "kWarps", (2, 4, 8), "warps of a block, which divide its rows or keys"),
    Knob("key_passes", "kKeyPasses", ("one", "two"), "dK and dV together, or each with scores of its own"),
    Knob("score_pieces", "kScorePieces", (2, 4), "pieces of 8 columns of S and dP whose sums are under way together"),
    Knob("score_steps", "kScoreSteps", (1, 2), "steps of 16 columns of S and dP that are scheduled together"),
    Knob("stages", "kStages", (1, 2, 3), "tiles that pass by in shared memory"),
    Knob("blocks_per_sm", "kBlocksPerSm", (1, 2, 3), "blocks the register budget is cut for"),
)

OTHER_REGISTERS = 12  # beside fragments: few, since ptxas never holds all operands at once that are counted here
_PASSES = ("dq", "dk", "dv")


def _tiles(c: Config, of: str) -> tuple[int, int]:
    """Rows that a block owns in a pass, and rows of the other side that pass by."""
    return (int(c.dq_tile_m), int(c.dq_tile_n)) if of == "dq" else (int(c.tile_n), int(c.tile_m))


def _passes(c: Config) -> tuple[str, ...]:
    return _PASSES[c.dq_route == "atomics" : 3 if c.key_passes == "two" else 2]


def _sums(p: Problem, c: Config, of: str) -> tuple[int, int]:
    """Columns of dS K or dS^T Q, and of P^T dO, that a pass adds up: whole groups of 32."""
    d, dv = _row_floats(p.head_dim_padded), _row_floats(p.head_dim_v_padded)
    return d if of != "dv" else 0, dv if of == "dv" or (of == "dk" and c.key_passes == "one") else 0


def _row_floats(columns: int) -> int:
    """Of a row in shared memory."""
    return -(-columns // 32) * 32


def smem_bytes(p: Problem, c: Config, of: str) -> int:
    """Of the pass for dq, dk or dv."""
    own, other = _tiles(c, of)
    d, dv = _row_floats(p.head_dim_padded), _row_floats(p.head_dim_v_padded)
    stage = other * (d + dv + (0 if of == "dq" else 2))
    cells = other * (own + 8) if of == "dk" and c.dq_route == "atomics" else 0
    return 4 * (own * (d + (dv if of != "dv" else 0)) + c.stages * stage + cells)


def fragment_registers(p: Problem, c: Config, of: str) -> int:
    """Registers of a thread that hold the gradients, and S and dP with their operands or the parts of P or dS."""
    own, other = _tiles(c, of)
    slabs, differentiated, both = own // (16 * int(c.warps)), of != "dv", all(_sums(p, c, of))
    cells, at_once = slabs * other // 2, int(c.score_pieces)
    of_cells = (2 if differentiated else 1) * cells + 16 * slabs + at_once * (8 + 4 * slabs)
    of_sums = (3 if both else 2) * cells + 32 * slabs + 16
    of_dq = 96 if of == "dk" and c.dq_route == "atomics" else 0
    return slabs * sum(_sums(p, c, of)) // 2 + max(of_cells, of_sums, of_dq)


def _most(p: Problem, c: Config) -> int:
    return max(fragment_registers(p, c, of) for of in _passes(c))


def _even_share(p: Problem, t: Target, c: Config) -> str | None:
    for name in ("tile_n", "dq_tile_m"):
        slabs, rest = divmod(int(c[name]), 16 * int(c.warps))
        if rest or not slabs:
            return f"{name} {c[name]} is no multiple of 16 rows x {c.warps} warps"
        if slabs > 2:
            return f"a warp has {16 * slabs} rows of {name} {c[name]}; 16 or 32 fit in its registers"
    return None


def _pieces_exist(p: Problem, t: Target, c: Config) -> str | None:
    least = int(c.tile_m) if c.dq_route == "atomics" else min(int(c.tile_m), int(c.dq_tile_n))
    if c.score_pieces * 8 > least:
        return f"{c.score_pieces} pieces of 8 columns are more than a tile of {least} has"
    if c.score_steps * 16 > min(p.head_dim_padded, p.head_dim_v_padded):
        return f"{c.score_steps} steps of 16 columns are more than head dims {p.head_dim} and {p.head_dim_v} have"
    return None


def _one_route(p: Problem, t: Target, c: Config) -> str | None:
    if c.dq_route == "own_pass":
        return None
    if getattr(p, "deterministic", False):
        return "float32 additions of blocks come in any order: deterministic needs dq_route=own_pass"
    if (c.dq_tile_m, c.dq_tile_n) != (c.tile_n, 16):
        return f"dq_tile_m {c.dq_tile_m} and dq_tile_n {c.dq_tile_n} are of own_pass; tile_n and 16 stand for none"
    return None


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.smem_fits(max(smem_bytes(p, c, of) for of in _passes(c)), t, c)


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.registers_fit(_most(p, c) + OTHER_REGISTERS, register_limit(c), c)


def _supports(p: Problem, t: Target) -> str | None:
    if lacking := device_limits.needs_sm80(t):
        return lacking
    return f"serves fp32, not {p.dtype}" if p.dtype != "fp32" else p.wider_than(256)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    dq, dk, dv = (smem_bytes(p, c, of) for of in _PASSES)
    return {"smem_bytes": dk, "dq_smem_bytes": dq, "dv_smem_bytes": dv}


def _make(**values: Value) -> Config:
    base: dict[str, Value] = {
        "tile_m": 32, "tile_n": 64, "dq_route": "own_pass", "dq_tile_m": 64, "dq_tile_n": 32, "warps": 4,
        "key_passes": "one", "score_pieces": 2, "score_steps": 1, "stages": 2, "blocks_per_sm": 1,
    }  # fmt: skip
    return Config({**base, **values})


def _added(**values: Value) -> Config:
    """dQ by additions of the blocks that own keys."""
    return _make(dq_route="atomics", dq_tile_m=values.get("tile_n", 64), dq_tile_n=16, **values)


_EIGHT: dict[str, Value] = {"warps": 8, "tile_n": 128, "dq_tile_m": 128}
# Good guesses by head dim, the best first; the first legal one with registers to spare is the default. The smallest fit
# everywhere.
_GUESSES = (
    (
        32,
        [
            _added(tile_m=64, blocks_per_sm=2),
            _make(tile_n=128, dq_tile_m=128, blocks_per_sm=2),
            _make(tile_m=64, dq_tile_m=128, blocks_per_sm=2),
            _make(blocks_per_sm=3),
        ],
    ),
    (
        64,
        [
            _added(tile_m=64, tile_n=128, warps=8),
            _added(blocks_per_sm=2),
            _make(tile_m=64, dq_tile_m=128, blocks_per_sm=2),
            _make(blocks_per_sm=2),
            _make(**_EIGHT, tile_m=64),
            _make(),
        ],
    ),
    (
        128,
        [
            _added(tile_n=128, warps=8),
            _make(**_EIGHT),
            _make(**_EIGHT, tile_m=16, dq_tile_n=16),
            _make(**_EIGHT, key_passes="two"),
        ],
    ),
    (
        256,
        [
            _added(key_passes="two", stages=1),
            _make(key_passes="two"),
            _make(key_passes="two", stages=1),
            _make(tile_m=16, dq_tile_n=16, key_passes="two"),
        ],
    ),
)
_SMALLEST = [
    _make(tile_m=16, tile_n=own, dq_tile_m=own, dq_tile_n=16, warps=own // 16, key_passes=passes, stages=stages)
    for own in (64, 32)
    for passes in ("one", "two")
    for stages in (2, 1)
]


def _guesses(p: Problem, t: Target) -> list[Config]:
    """The legal ones of the table."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    table = next(guesses for limit, guesses in _GUESSES if size <= limit)
    return [c for c in (*table, *_SMALLEST) if not any(k.check(p, t, c) for k in CONSTRAINTS)]


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare: nobody has looked at its spills for this very problem and GPU."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    of_intervals = 40 if 32 < size <= 64 else 30  # nvcc 13.0 spills there with tiles of 64 rows
    spare = OTHER_REGISTERS + (of_intervals if p.mask == "intervals" else 0) + (10 if p.softcap or p.alibi else 0)
    spare += (20 if p.dropout else 0) + (0 if p.aligned else 10 if size <= 128 else 25)
    of_additions = 0 if t.capability >= 90 else 40  # they are of single numbers, each with an address
    guesses = _guesses(p, t)
    roomy = (
        c
        for c in guesses
        if _most(p, c) + spare + (of_additions if c.dq_route == "atomics" else 0) <= register_limit(c)
    )
    return next(roomy, min(guesses, key=lambda c: _most(p, c) - register_limit(c)))


def _resources(p: Problem, t: Target, c: Config) -> tuple:
    return (max(smem_bytes(p, c, of) for of in _passes(c)), c.warps, _most(p, c))


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: of each pass its products against what they read of shared memory and what splits their
    operands, the exponentials, latency that few warps cannot hide, the tail. Not measured yet."""
    return sum(_pass_cost(p, t, c, of) for of in _passes(c))


def _pass_cost(p: Problem, t: Target, c: Config, of: str) -> float:
    d, dv, (own, other) = p.head_dim_padded, p.head_dim_v_padded, _tiles(c, of)
    warps, blocks = int(c.warps), int(c.blocks_per_sm)
    depth, summed = d + (dv if of != "dv" else 0), sum(_sums(p, c, of))
    adds_dq = of == "dk" and c.dq_route == "atomics"
    terms = 3 * own * other * (depth + summed + (d if adds_dq else 0))
    products = terms / (1024 if t.capability >= 90 else 512) / 0.62
    read = (own * depth + warps * other * (depth + summed)) * 4 / 128
    # instructions of warps, as counted in the disassembly: products, operands read and split, additions to the sums,
    # cells, and what each warp does for a visit
    operands = 1.0 * own * depth + warps * other * (depth + summed)
    adds = own * other * depth / 16 + 2 * own * summed
    if adds_dq:  # 16 rows and 32 columns of dQ of a warp at a time
        read += own * other * d * (1 / 16 + 1 / 32) * 4 / 128
        operands += own * other * d * (1 / 16 + 1 / 32)
        adds += own * other * d / 16
    issued = terms / 1024 + 250 * warps + (3.3 * operands + 1.5 * adds + 24 * own * other) / 32
    hidden = min(1.0, warps * blocks / 16)
    idle = 4 / min(4, warps * blocks)  # schedulers have warps of their own
    bounds = sorted((products * idle, read, issued / 4 / 0.75 * idle))
    busy = bounds[2] + (1 - 0.6 * hidden) * bounds[1]
    visit = busy + {1: 900, 2: 420, 3: 320}[int(c.stages)] / blocks * (1 if warps >= 4 else 1.3)
    # tiles of keys see as many of rows in all as tiles of rows see of keys
    seen = walk(p, own, other) if of == "dq" else walk(p, other, own)
    tiles = seen.row_tiles if of == "dq" else -(-p.seqlen_k // own)
    group = 1 if of == "dq" else p.heads // p.kv_heads
    heads, most = p.batch * p.heads, seen.most if of == "dq" else -(-p.seqlen_q // other)
    boundary = 2500 / blocks + own * (depth + summed) * 4 / 24
    work = heads * (seen.visits * visit + seen.masked * own * other * 0.03) + heads // group * tiles * boundary
    return makespan(work, group * most * visit + boundary, heads // group * tiles, t.units, 0.15)


_DQ = ("dq_route", "dq_tile_m", "dq_tile_n")
_SHAPE = ("tile_m", "tile_n", *_DQ, "warps", "key_passes")
CONSTRAINTS = (
    Constraint("even_share", _even_share, ("tile_n", "dq_tile_m", "warps")),
    Constraint("pieces_exist", _pieces_exist, ("tile_m", "dq_route", "dq_tile_n", "score_pieces", "score_steps")),
    Constraint("one_route", _one_route, ("tile_n", *_DQ)),
    Constraint("smem_fits", _smem_fits, (*_SHAPE, "stages", "blocks_per_sm")),
    Constraint("registers_fit", _registers_fit, (*_SHAPE, "score_pieces", "blocks_per_sm")),
)

FAMILY = Family(
    name="sm80_backward_fp32",
    template="sm80/backward_fp32.cu.j2",
    op="backward",
    dtypes=("fp32",),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=_default,
    default_reads=nothing,
    flags=lambda t: (device_limits.gencode(t), *FLAGS),
    first_configs=lambda p, t: _guesses(p, t)[1:5],
    cost=cost,
    resources=_resources,
)
