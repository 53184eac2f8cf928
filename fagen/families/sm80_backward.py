"""Backward for every NVIDIA GPU from sm_80 up: ldmatrix, mma.sync, cp.async. A block owns a tile of keys, as in
FlashAttention 2."""

from __future__ import annotations

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.families.cost import makespan, walk
from fagen.families.reads import Reads
from fagen.families.sm80_forward import FLAGS, OTHER_REGISTERS, register_limit
from fagen.ops.attention.measures import AtMost
from fagen.ops.attention.problem import Problem
from fagen.target import Target

# The knobs that shape a block come first, so that a share that does not divide is dropped before the rest is varied.
KNOBS = (
    Knob("tile_m", "kTileM", (32, 64, 128), "rows of q that pass by at a time"),
    Knob("tile_n", "kTileN", (32, 64, 96, 128), "keys a block works on"),
    Knob("warps", "kWarps", (4, 8), "warps of a block"),
    Knob("weights_source", "kWeightsSource", ("shared", "registers"), "where P and dS wait for dV and dK"),
    Knob("row_warps", "kRowWarps", (1, 2, 4), "warps along the rows of S and dP; the others divide the keys"),
    Knob("key_warps", "kKeyWarps", (1, 2, 4, 8), "warps along the keys of dK and dV; the others divide the columns"),
    Knob("dq_route", "kDqRoute", ("atomics", "own_kernel"), "dQ by float32 additions, or by blocks of its own"),
    Knob("dq_row_warps", "kDqRowWarps", (1, 2, 4), "atomics: warps along the rows of dQ; the others divide columns"),
    Knob("dq_tile_m", "kDqTileM", (64, 128), "own_kernel: rows of its blocks"),
    Knob("dq_tile_n", "kDqTileN", (16, 32, 64), "own_kernel: keys that pass by at a time"),
    Knob("v_source", "kVSource", ("shared", "registers"), "where v waits for its products"),
    Knob("blocks_per_sm", "kBlocksPerSm", (1, 2), "blocks the register budget is cut for"),
    Knob("smem_layout", "kSmemLayout", ("swizzled", "padded"), "how shared memory avoids bank conflicts"),
    Knob("q_stages", "kQStages", (1, 2), "tiles of q in shared memory"),
    Knob("dout_stages", "kDoutStages", (1, 2), "tiles of dO in shared memory"),
    Knob("gqa", "kGqa", ("in_block", "atomics"), "heads of a group one after the other, or by float32 additions"),
    Knob("block_order", "kBlockOrder", ("ascending", "longest_first"), "order of key tiles and heads"),
)


def _round_up(a: int, unit: int) -> int:
    return -(-a // unit) * unit


def _dims(p: Problem, c: Config) -> tuple[int, int]:
    """Columns of q and k, and of v and dO, in shared memory: as many as the warps share evenly."""
    columns = c.warps // c.key_warps
    split = max(columns, c.warps // c.dq_row_warps) if c.dq_route == "atomics" else columns
    return _round_up(p.head_dim, 16 * split), _round_up(p.head_dim_v, 16 * columns)


def _cells(c: Config) -> tuple[int, int]:
    """A warp's lines of S, and its cells of each: rows and keys, or keys and rows where they stay in registers."""
    if c.weights_source == "registers":
        return c.tile_n // c.warps, c.tile_m
    return c.tile_m // c.row_warps, c.tile_n * c.row_warps // c.warps


def _tile_bytes(rows: int, cols: int, c: Config) -> int:
    return rows * (cols * 2 + (0 if c.smem_layout == "swizzled" else 16))


def smem_bytes(p: Problem, c: Config) -> int:
    d, dv = _dims(p, c)
    k, v = _tile_bytes(c.tile_n, d, c), _tile_bytes(c.tile_n, dv, c)
    stages = c.q_stages * (_tile_bytes(c.tile_m, d, c) + c.tile_m * 8) + c.dout_stages * _tile_bytes(c.tile_m, dv, c)
    if c.weights_source == "shared":
        cells = 2 * _tile_bytes(c.tile_m, c.tile_n, c)
    else:
        cells = _tile_bytes(c.tile_n, c.tile_m, c) if c.dq_route == "atomics" else 0
    return max(k + (v if c.v_source == "shared" else 0) + stages + cells, k + v)


def dq_smem_bytes(p: Problem, c: Config) -> int:
    dims = (p.head_dim_padded, p.head_dim_v_padded)
    return sum(_tile_bytes(c.dq_tile_m, d, c) + 2 * _tile_bytes(c.dq_tile_n, d, c) for d in dims)


def fragment_registers(p: Problem, c: Config) -> int:
    """Registers of a thread of the main kernel that hold pieces of dK, dV, S, dP, dQ and perhaps V."""
    d, dv = _dims(p, c)
    lines, cells = _cells(c)
    held = c.tile_n * (d + dv) // c.warps // 32
    if c.v_source == "registers":
        held += (lines if c.weights_source == "registers" else cells) * dv // 64
    scores = lines * cells // 32
    dq = c.tile_m * d // c.warps // 32 if c.dq_route == "atomics" else 0
    return held + max(2 * scores, dq)  # P and dS in 16 bits take the room of S and dP


def dq_registers(p: Problem, c: Config) -> int:
    """The same of the kernel of dQ."""
    rows = c.dq_tile_m // c.warps
    return rows * (p.head_dim_padded + 2 * c.dq_tile_n) // 32


def _even_share(p: Problem, t: Target, c: Config) -> str | None:
    for name in ("row_warps", "key_warps", "dq_row_warps"):
        if c[name] > c.warps:
            return f"{name} {c[name]} > {c.warps} warps"
    lines, cells = _cells(c)
    along = c.warps if c.weights_source == "registers" else c.row_warps
    if lines % 16 or lines * along != (c.tile_n if c.weights_source == "registers" else c.tile_m):
        return f"S of {c.tile_m} x {c.tile_n} ({c.weights_source}) is no multiple of 16 x {along} warps"
    if cells % 16 or (c.weights_source == "shared" and cells * (c.warps // c.row_warps) != c.tile_n):
        return f"tile_n {c.tile_n} is no multiple of 16 keys x {c.warps // c.row_warps} warps"
    if c.tile_n % (16 * c.key_warps):
        return f"tile_n {c.tile_n} is no multiple of 16 keys x {c.key_warps} warps (dK, dV)"
    return None


def _one_scheme(p: Problem, t: Target, c: Config) -> str | None:
    if c.weights_source == "registers" and (c.row_warps != 1 or c.key_warps != c.warps):
        return (
            f"P and dS stay in registers where each of {c.warps} warps has keys of its own: row_warps=1, key_warps=all"
        )
    if c.dq_route == "atomics":
        if c.tile_m % (16 * c.dq_row_warps):
            return f"tile_m {c.tile_m} is no multiple of 16 rows x {c.dq_row_warps} warps (dQ)"
        if (c.dq_tile_m, c.dq_tile_n) != (64, 16):
            return (
                f"dq_tile_m {c.dq_tile_m} and dq_tile_n {c.dq_tile_n} are of dQ's own kernel; 64 and 16 stand for none"
            )
    elif c.dq_row_warps != 1:
        return (
            f"dq_row_warps {c.dq_row_warps}: with a kernel of its own, dQ is none of the main one's; 1 stands for none"
        )
    elif c.dq_tile_m % (16 * c.warps):
        return f"dq_tile_m {c.dq_tile_m} is no multiple of 16 rows x {c.warps} warps"
    return None


def _reproducible(p: Problem, t: Target, c: Config) -> str | None:
    if not getattr(p, "deterministic", False):
        return None
    for name, wanted in (("dq_route", "own_kernel"), ("gqa", "in_block")):
        if c[name] != wanted:
            return f"float32 additions of blocks come in any order: {name}={c[name]}, deterministic needs {wanted}"
    return None


def _order_matters(p: Problem, t: Target, c: Config) -> str | None:
    if p.mask == "none" and c.block_order == "longest_first":
        return "without a mask all tiles are equally long: longest_first only scatters the heads"
    return None


def _parts_begin_well(p: Problem, t: Target, c: Config) -> str | None:
    """Swizzled, a warp's columns must begin where the exchange of 16-byte pieces starts anew, or lie within one."""
    if c.smem_layout == "padded":
        return None
    d, dv = _dims(p, c)
    shares = [(d, d * c.key_warps // c.warps), (dv, dv * c.key_warps // c.warps)]
    if c.weights_source == "shared":
        shares.append((c.tile_n, c.tile_n // c.key_warps))
    if c.dq_route == "atomics":
        shares.append((d, d * c.dq_row_warps // c.warps))
        if c.weights_source == "registers":
            shares.append((c.tile_m, c.tile_m // c.dq_row_warps))
    for width, share in shares:
        unit = next(unit for unit in (64, 32, 16) if width % unit == 0)
        if share % unit and unit % share:
            return f"a part of {share} of {width} columns begins amid {unit} swizzled ones"
    return None


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    if too_much := device_limits.smem_fits(smem_bytes(p, c), t, c):
        return too_much
    if c.dq_route == "own_kernel" and dq_smem_bytes(p, c) > t.smem_per_block:
        return f"dQ's kernel: {dq_smem_bytes(p, c)} > {t.smem_per_block} bytes of shared memory on {t.arch}"
    return None


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    if too_many := device_limits.registers_fit(fragment_registers(p, c) + OTHER_REGISTERS, register_limit(c), c):
        return too_many
    if c.dq_route == "own_kernel" and dq_registers(p, c) + OTHER_REGISTERS > 255:
        return f"dQ's kernel: about {dq_registers(p, c) + OTHER_REGISTERS} > 255 registers a thread"
    return None


def _supports(p: Problem, t: Target) -> str | None:
    if lacking := device_limits.needs_sm80(t):
        return lacking
    if p.dtype not in ("fp16", "bf16"):
        return f"serves fp16 and bf16, not {p.dtype}"
    return p.wider_than(256)


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"threads": 32 * int(c.warps), "smem_bytes": smem_bytes(p, c), "dq_smem_bytes": dq_smem_bytes(p, c)}


def _make(**values: Value) -> Config:
    base: dict[str, Value] = {
        "tile_m": 64, "tile_n": 64, "warps": 4, "weights_source": "shared", "row_warps": 2, "key_warps": 2,
        "dq_route": "atomics", "dq_row_warps": 2, "dq_tile_m": 64, "dq_tile_n": 16, "v_source": "shared",
        "blocks_per_sm": 1, "smem_layout": "swizzled", "q_stages": 2, "dout_stages": 1, "gqa": "in_block",
        "block_order": "ascending",
    }  # fmt: skip
    return Config({**base, **values})


def _held(warps: int, **values: Value) -> Config:
    """P and dS stay in registers."""
    return _make(warps=warps, weights_source="registers", row_warps=1, key_warps=warps, **values)


_EIGHT: dict[str, Value] = {"warps": 8, "row_warps": 2, "key_warps": 4}
# Guesses by head dim, the best first; the first legal one is the default. The smallest fit everywhere.
_GUESSES = (
    (
        64,
        [
            _make(tile_m=64, tile_n=128, **_EIGHT, dq_row_warps=4, dout_stages=2),
            _held(8, tile_m=64, tile_n=128, dq_row_warps=4),
            _make(tile_m=64, tile_n=64, **_EIGHT, dout_stages=2),
            _make(tile_m=64, tile_n=64, blocks_per_sm=2),
        ],
    ),
    (
        128,
        [
            _make(tile_m=64, tile_n=128, **_EIGHT, smem_layout="padded"),
            _make(tile_m=64, tile_n=128, **_EIGHT, q_stages=1),
            _make(tile_m=64, tile_n=64, **_EIGHT, dout_stages=2),
            _make(tile_m=64, tile_n=64, **_EIGHT),
            _held(8, tile_m=64, tile_n=128, dq_row_warps=2),
        ],
    ),
    (
        256,
        [
            _make(tile_m=64, tile_n=64, **_EIGHT, q_stages=1),
            _make(tile_m=64, tile_n=64, **_EIGHT, q_stages=1, smem_layout="padded"),
            _make(tile_m=32, tile_n=32, q_stages=1),
        ],
    ),
)
_SMALLEST = [_make(tile_m=32, tile_n=32, q_stages=1, smem_layout=layout) for layout in ("swizzled", "padded")]
_DQ_TILES = ((128, 64), (128, 32), (64, 64), (64, 32), (128, 16), (64, 16))


def _has_many_blocks(p: Problem, t: Target) -> bool:
    """So many that a long one at the end is little of it all. The longest of all heads first would then have each SM at
    another head: what they read, and the sums of dQ, would not fit L2."""
    return p.batch * p.kv_heads * -(-p.seqlen_k // 128) >= 4 * t.units


def _default_reads(p: Problem, t: Target) -> tuple[AtMost, ...]:
    """What `_has_many_blocks` asks, where the order depends on it."""
    return () if p.mask == "none" else (AtMost("key_blocks", 4 * t.units - 1, tile=128),)


def _adapted(p: Problem, t: Target, c: Config) -> Config | None:
    """The guess with the mask's order, and dQ by its own kernel where runs must agree; None if that is not legal."""
    c = c.replace(block_order="ascending" if p.mask == "none" or _has_many_blocks(p, t) else "longest_first")
    several = [c]
    if getattr(p, "deterministic", False):
        own = c.replace(dq_route="own_kernel", dq_row_warps=1)
        several = [own.replace(dq_tile_m=m, dq_tile_n=n) for m, n in _DQ_TILES]
    return next((one for one in several if not any(k.check(p, t, one) for k in CONSTRAINTS)), None)


def _guesses(p: Problem, t: Target) -> list[Config]:
    """The legal ones of the table."""
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    table = next(guesses for limit, guesses in _GUESSES if size <= limit)
    return [c for guess in [*table, *_SMALLEST] if (c := _adapted(p, t, guess))]


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare: ptxas keeps operands of the next products in all that there are."""
    spare = 40 + (30 if p.mask == "intervals" or p.softcap or p.alibi else 0) + (0 if p.aligned else 60)
    guesses = _guesses(p, t)
    roomy = (c for c in guesses if fragment_registers(p, c) + spare <= register_limit(c))
    return next(roomy, guesses[-1])


def _resources(p: Problem, t: Target, c: Config) -> tuple:
    return (smem_bytes(p, c), c.warps, fragment_registers(p, c))


def _shared_reads(p: Problem, c: Config) -> float:
    """Bytes that the warps of a block read and write of shared memory for one tile of rows."""
    d, dv = _dims(p, c)
    lines, cells = _cells(c)
    v_lines, v_cells = lines, cells
    if c.v_source == "registers":
        v_lines, v_cells = (0, cells) if c.weights_source == "registers" else (lines, 0)
    read = (lines + cells) * d + (v_lines + v_cells) * dv
    columns = c.warps // c.key_warps
    read += c.tile_m * (d + dv) // columns
    if c.weights_source == "shared":
        read += 2 * c.tile_m * c.tile_n // c.key_warps + 2 * c.tile_m * c.tile_n // c.warps
    if c.dq_route == "atomics":
        read += c.tile_n * (c.tile_m // c.dq_row_warps + d * c.dq_row_warps // c.warps)
    return read * 2 * int(c.warps)


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: five products against what they read of shared memory, the exponentials beside them, dQ's way
    to memory, latency that few warps cannot hide, the tail. Not measured yet.
    """
    d, dv = _dims(p, c)
    m, n, warps, blocks = int(c.tile_m), int(c.tile_n), int(c.warps), int(c.blocks_per_sm)
    here = c.dq_route == "atomics"
    products = m * n * (2 * (d + dv) + (d if here else 0)) / 1100
    shared = _shared_reads(p, c) / 128
    hidden = min(1.0, warps * blocks / 16)
    busy = max(products, shared) + (1 - 0.5 * hidden) * (min(products, shared) + m * n * 0.15)
    latency = 500 + 400 * (int(c.q_stages) == 1) + 150 * (int(c.dout_stages) == 1)
    visit = busy + latency / blocks + (m * d * 4 / 24 if here else 0)
    if fragment_registers(p, c) + 60 > register_limit(c):
        visit *= 1.15
    seen, heads = walk(p, m, n), p.batch * p.heads
    group = p.heads // p.kv_heads if c.gqa == "in_block" else 1
    tiles = -(-p.seqlen_k // n)
    boundary = 3000 / blocks + n * (d + dv) * (8 if group > 1 or c.gqa == "in_block" else 16) / 24
    work = heads * (seen.visits * visit + seen.masked * m * n * 0.04) + heads // group * tiles * boundary
    longest = group * -(-p.seqlen_q // m) * visit + boundary
    tail = 0.15 if p.mask == "none" or c.block_order == "longest_first" else 0.6
    total = makespan(work, longest, heads // group * tiles, t.units, tail)
    return total if here else total + _own_kernel(p, t, c)


def _own_kernel(p: Problem, t: Target, c: Config) -> float:
    """The cycles of dQ's kernel: S and dP once more, and one product."""
    d, dv, m, n = p.head_dim_padded, p.head_dim_v_padded, int(c.dq_tile_m), int(c.dq_tile_n)
    warps = int(c.warps)
    products = m * n * (2 * d + dv) / 1100
    shared = warps * (m // warps * (d + dv) + n * (2 * d + dv)) * 2 / 128
    visit = max(products, shared) + 0.6 * (min(products, shared) + m * n * 0.15) + 350
    seen, heads = walk(p, m, n), p.batch * p.heads
    boundary = 2500 + m * (d + dv) * 2 / 24
    work = heads * (seen.visits * visit + seen.row_tiles * boundary)
    return makespan(work, seen.most * visit + boundary, heads * seen.row_tiles, t.units, 0.2)


_SHAPE = ("tile_m", "tile_n", "warps", "weights_source", "row_warps", "key_warps")
_DQ = ("dq_route", "dq_row_warps", "dq_tile_m", "dq_tile_n")
_MEMORY = (*_SHAPE, *_DQ, "q_stages", "dout_stages", "v_source", "smem_layout", "blocks_per_sm")
CONSTRAINTS = (
    Constraint("even_share", _even_share, (*_SHAPE, "dq_row_warps")),
    Constraint("one_scheme", _one_scheme, (*_SHAPE, *_DQ)),
    Constraint("reproducible", _reproducible, ("dq_route", "gqa")),
    Constraint("order_matters", _order_matters, ("block_order",)),
    Constraint("parts_begin_well", _parts_begin_well, (*_SHAPE, "dq_route", "dq_row_warps", "smem_layout")),
    Constraint("smem_fits", _smem_fits, _MEMORY),
    Constraint("registers_fit", _registers_fit, (*_SHAPE, *_DQ, "v_source", "blocks_per_sm")),
)

FAMILY = Family(
    name="sm80_backward",
    template="sm80/backward.cu.j2",
    op="backward",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=_default,
    default_reads=Reads(_default_reads),
    flags=lambda t: (device_limits.gencode(t), *FLAGS),
    first_configs=lambda p, t: _guesses(p, t)[1:],
    repeats=lambda p, c: c.gqa == "atomics" and p.heads == p.kv_heads,
    cost=cost,
    resources=_resources,
)
