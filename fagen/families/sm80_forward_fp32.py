"""Forward in float32 on the tensor cores of every NVIDIA GPU from sm_80 up: tf32 products by mma.sync, cp.async.

`split` gives float32's own accuracy for three products: an operand is the sum of two tf32 numbers. `single` rounds it
to one, where the problem allows TF32. Head dims from 1 to 256, any alignment.
"""

from __future__ import annotations

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.families.cost import key_bytes, makespan, walk
from fagen.families.reads import nothing
from fagen.ops.attention.problem import Problem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "-Xptxas=-v", "-lineinfo")  # no fast math: its tanh and division are of 16 bits' accuracy

KNOBS = (
    Knob("tile_m", "kTileM", (16, 32, 64, 128, 256), "rows of q a block works on"),
    Knob("tile_n", "kTileN", (16, 32, 48, 64), "keys a block loads at a time"),
    Knob("warps", "kWarps", (1, 2, 4, 8), "warps of a block, which divide its rows"),
    Knob("products", "kProducts", ("split", "single"), "three products of tf32 for one of float32, or one"),
    Knob("score_steps", "kScoreSteps", (1, 2), "steps of 16 columns of Q K^T that are scheduled together"),
    Knob("value_steps", "kValueSteps", (2, 4, 8), "steps of 8 keys of P V that are scheduled together"),
    Knob("stages", "kStages", (1, 2, 3), "tiles of keys in shared memory; 1: K and V take turns"),
    Knob("blocks_per_sm", "kBlocksPerSm", (1, 2, 3, 4), "blocks the register budget is cut for"),
    Knob(
        "block_order",
        "kBlockOrder",
        ("ascending", "descending", "longest_first", "sectioned"),
        "order of row tiles and heads",
    ),
)

REGISTERS_PER_SM = 65536
OTHER_REGISTERS = 44  # addresses, maxima and sums, loop state: what a thread needs beside its fragments


def _slabs(c: Config) -> int:
    """Slabs of 16 rows of a warp."""
    return int(c.tile_m) // (16 * int(c.warps))


def _vector(p: Problem, c: Config) -> int:
    """Columns of v that a lane loads at once."""
    dv = p.head_dim_v_padded
    return 4 if dv % 32 == 0 and dv <= 128 and _slabs(c) == 1 else 2


def smem_bytes(p: Problem, c: Config) -> int:
    d, dv = p.head_dim_padded, p.head_dim_v_padded
    return 4 * (c.tile_m * d + c.stages * c.tile_n * (d + dv + 4))


def fragment_registers(p: Problem, c: Config) -> int:
    """Registers of a thread that hold O, and S with its operands or P with those of O."""
    slabs, parts, keys = _slabs(c), 2 if c.products == "split" else 1, int(c.tile_n)
    at_once = 4 if slabs == 1 and keys % 32 == 0 else 2
    of_s = slabs * (keys // 2 + 4 * at_once + 8 * parts) + 4 * parts * at_once
    of_o = parts * (slabs * (keys // 2 + 4 * _vector(p, c)) + 2 * _vector(p, c))
    return slabs * p.head_dim_v_padded // 2 + max(of_s, of_o)


def register_limit(c: Config) -> int:
    return min(255, REGISTERS_PER_SM // (32 * int(c.warps) * int(c.blocks_per_sm)) // 8 * 8)


def _even_share(p: Problem, t: Target, c: Config) -> str | None:
    if c.tile_m % (16 * c.warps):
        return f"tile_m {c.tile_m} is no multiple of 16 rows x {c.warps} warps"
    if _slabs(c) > 2:
        return f"a warp of {16 * _slabs(c)} rows; 16 or 32 fit in its registers"
    return None


def _steps_exist(p: Problem, t: Target, c: Config) -> str | None:
    if c.value_steps > 2 and c.value_steps * 8 > c.tile_n:
        return f"{c.value_steps} steps of 8 keys are more than tile_n {c.tile_n} has"
    if c.score_steps * 16 > p.head_dim_padded:
        return f"{c.score_steps} steps of 16 columns are more than head_dim {p.head_dim_padded} has"
    return None


def _tf32_allowed(p: Problem, t: Target, c: Config) -> str | None:
    return None if p.tf32 or c.products == "split" else "the problem does not allow products rounded to TF32"


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.smem_fits(smem_bytes(p, c), t, c)


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    return device_limits.registers_fit(fragment_registers(p, c) + OTHER_REGISTERS, register_limit(c), c)


def _supports(p: Problem, t: Target) -> str | None:
    if lacking := device_limits.needs_sm80(t):
        return lacking
    return f"serves fp32, not {p.dtype}" if p.dtype != "fp32" else p.wider_than(256)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"smem_bytes": smem_bytes(p, c)}


def _make(**values: Value) -> Config:
    base: dict[str, Value] = {
        "tile_m": 64, "tile_n": 32, "warps": 4, "products": "split", "score_steps": 2, "value_steps": 4, "stages": 2,
        "blocks_per_sm": 1, "block_order": "ascending",
    }  # fmt: skip
    return Config({**base, **values})


# Good guesses by head dim, the best first; the first legal one is the default. The smallest fit everywhere.
_GUESSES = (
    (
        64,
        [
            _make(tile_m=128, blocks_per_sm=2),
            _make(tile_m=128, tile_n=64, warps=8),
            _make(value_steps=2, blocks_per_sm=3),
            _make(tile_n=64, blocks_per_sm=2),
            _make(tile_m=256, warps=8),
        ],
    ),
    (
        128,
        [
            _make(tile_m=128, tile_n=64, warps=8),
            _make(blocks_per_sm=2),
            _make(tile_m=128, warps=8, stages=3),
            _make(tile_m=128, tile_n=48, warps=8),
        ],
    ),
    (
        256,
        [
            _make(tile_m=128, warps=8, stages=1),
            _make(tile_m=128, tile_n=16, value_steps=2, warps=8),
            _make(tile_m=64, tile_n=16, value_steps=2, stages=1, blocks_per_sm=2),
            _make(tile_m=64),
        ],
    ),
)
_SMALLEST = [
    _make(stages=1),
    _make(tile_n=16, value_steps=2),
    _make(tile_n=16, value_steps=2, stages=1),
    _make(tile_m=32, tile_n=16, value_steps=2, warps=2, stages=1),
    _make(tile_m=16, tile_n=16, value_steps=2, warps=1, stages=1),
]


def _guesses(p: Problem, t: Target) -> list[Config]:
    """The legal ones of the table."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    order = "ascending" if p.mask == "none" else "longest_first"
    products = "single" if p.tf32 else "split"
    table = next(guesses for limit, guesses in _GUESSES if size <= limit)
    steps = min(2, p.head_dim_padded // 16) if p.aligned else 1  # copies of single numbers take registers
    always: dict[str, Value] = {"block_order": order, "products": products, "score_steps": steps}
    shaped = [c.replace(**always) for c in (*table, *_SMALLEST)]
    return [c for c in shaped if not any(k.check(p, t, c) for k in CONSTRAINTS)]


def _resources(p: Problem, t: Target, c: Config) -> tuple:
    return (smem_bytes(p, c), c.warps, fragment_registers(p, c))


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: products against what they read of shared memory and what splits their operands, the softmax,
    latency that few warps cannot hide, the tail. Each warp reads and splits its keys for its own rows."""
    d, dv, m, n = p.head_dim_padded, p.head_dim_v_padded, int(c.tile_m), int(c.tile_n)
    warps, blocks, terms = int(c.warps), int(c.blocks_per_sm), 3 if c.products == "split" else 1
    products = terms * m * n * (d + dv) / (1024 if t.capability >= 90 else 512) / 0.62
    read = (warps * n * (d + dv) + m * d) * 4 / 128
    operands = warps * (n * (d + dv) + 16 * _slabs(c) * d)
    # instructions of a warp, of which four issue at once: products, splits, additions to S and O, the softmax
    issued = terms * m * n * (d + dv) / 1024 + operands / 32 * terms + m * n * (d / 16 + 12) / 32 + 2 * m * dv / 32
    hidden = min(1.0, warps * blocks / 16)
    bounds = sorted((products, read, issued / 4))
    busy = bounds[2] + (1 - 0.6 * hidden) * bounds[1]
    visit = busy + {1: 900, 2: 420, 3: 320}[int(c.stages)] / blocks * (1 if warps >= 4 else 1.3)
    if fragment_registers(p, c) + 50 > register_limit(c):
        visit *= 1.12
    seen, heads = walk(p, m, n), p.batch * p.heads
    boundary = 2500 / blocks + m * (d + dv) * 4 / 24
    work = heads * (seen.visits * visit + seen.masked * m * n * 0.03 + seen.row_tiles * boundary)
    longest = seen.most * visit + boundary
    uneven = seen.most * seen.row_tiles > seen.visits
    tail = 0.15 if not uneven or c.block_order in ("longest_first", "sectioned") else 0.7
    total = makespan(work, longest, heads * seen.row_tiles, t.units, tail)
    return total * (1.04 if c.block_order == "longest_first" and key_bytes(p) > t.l2 else 1)


_SHAPE = ("tile_m", "tile_n", "warps")
CONSTRAINTS = (
    Constraint("even_share", _even_share, ("tile_m", "warps")),
    Constraint("steps_exist", _steps_exist, ("tile_n", "value_steps", "score_steps")),
    Constraint("tf32_allowed", _tf32_allowed, ("products",)),
    Constraint("order_matters", device_limits.order_matters, ("block_order",)),
    Constraint("smem_fits", _smem_fits, (*_SHAPE, "stages", "blocks_per_sm")),
    Constraint("registers_fit", _registers_fit, (*_SHAPE, "products", "blocks_per_sm")),
)

FAMILY = Family(
    name="sm80_forward_fp32",
    template="sm80/forward_fp32.cu.j2",
    op="forward",
    dtypes=("fp32",),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=lambda p, t: _guesses(p, t)[0],
    default_reads=nothing,
    flags=lambda t: (device_limits.gencode(t), *FLAGS),
    first_configs=lambda p, t: _guesses(p, t)[1:4],
    cost=cost,
    resources=_resources,
)
