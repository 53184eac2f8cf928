"""Forward for Hopper: copies by the copy engine (TMA), products by warpgroups (wgmma), a warp that only feeds them."""

from __future__ import annotations

from fagen.families.base import Config, Constraint, Family, Knob
from fagen.problem import Problem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")

KNOBS = (
    Knob("tile_m", "kTileM", (64, 128, 192), "rows of q a block works on, 64 a warpgroup"),
    Knob("tile_n", "kTileN", tuple(range(32, 209, 16)), "keys of a tile"),
    Knob("stages", "kStages", (1, 2, 3, 4), "tiles of keys, and of values, in shared memory"),
    Knob("overlap", "kOverlap", (False, True), "add up O under the softmax of the next tile"),
    Knob("rescale", "kRescale", ("each", "deferred"), "when O follows a grown maximum"),
    Knob(
        "block_order",
        "kBlockOrder",
        ("ascending", "descending", "longest_first", "sectioned"),
        "order of row tiles and heads",
    ),
)

# Of a consumer's thread, by warpgroups that compute; the kernel sets them at run time from the block's pool.
CONSUMER_REGISTERS = {1: 232, 2: 240, 3: 160}
OTHER_REGISTERS = 28  # addresses, maxima and sums, loop state


def _slabs(head_dim: int) -> int:
    return -(-head_dim // 64)


def smem_bytes(p: Problem, c: Config) -> int:
    slabs, slabs_v = _slabs(p.head_dim_padded), _slabs(p.head_dim_v_padded)
    tiles = c.tile_m * max(slabs, slabs_v) + c.stages * c.tile_n * (slabs + slabs_v)
    return tiles * 128 + 8 * (1 + 4 * c.stages) + 1024


def fragment_registers(p: Problem, c: Config) -> int:
    """S, the weights on their way and those of the next tile, and O."""
    return int(c.tile_n) // 2 + int(c.tile_n) // 4 + p.head_dim_v_padded // 2


def _order_matters(p: Problem, t: Target, c: Config) -> str | None:
    if p.mask == "none" and c.block_order in ("descending", "longest_first"):
        return f"without a mask all rows are equally long, block_order={c.block_order} only repeats another"
    return None


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    need, blocks = smem_bytes(p, c), 2 if c.tile_m == 64 else 1
    if need > t.smem_per_block:
        return f"{need} > {t.smem_per_block} bytes of shared memory on {t.arch}"
    if blocks * (need + 1024) > t.smem_per_unit:
        return f"{blocks} blocks x {need + 1024} > {t.smem_per_unit} bytes of shared memory an SM"
    return None


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    need, limit = fragment_registers(p, c) + OTHER_REGISTERS, CONSUMER_REGISTERS[int(c.tile_m) // 64]
    return f"about {need} > {limit} registers a thread" if need > limit else None


def _supports(p: Problem, t: Target) -> str | None:
    if not t.is_gpu or t.arch != "sm_90":
        return f"needs sm_90 (wgmma), the target is {t.arch}"
    if p.op != "forward":
        return f"serves forward, not {p.op}"
    if p.dtype not in ("fp16", "bf16"):
        return f"serves fp16 and bf16, not {p.dtype}"
    if not p.aligned:
        return "the copy engine needs rows that start at multiples of 16 bytes"
    return None


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {"threads": 2 * int(c.tile_m) + 128, "smem_bytes": smem_bytes(p, c)}


CONSTRAINTS = (
    Constraint("smem_fits", _smem_fits, ("tile_m", "tile_n", "stages")),
    Constraint("registers_fit", _registers_fit, ("tile_m", "tile_n")),
    Constraint("order_matters", _order_matters, ("block_order",)),
)

# (tile_m, tile_n, stages) by the larger head dim, the best first; the last ones fit every problem.
_GUESSES = (
    (64, ((192, 128, 2), (128, 128, 2), (64, 128, 2), (64, 64, 3))),
    (128, ((128, 128, 2), (128, 176, 2), (128, 112, 2), (64, 80, 2), (64, 64, 2))),
    (192, ((128, 128, 2), (128, 112, 2), (128, 96, 2), (128, 48, 2))),
    (256, ((128, 80, 2), (128, 64, 2), (128, 32, 2))),
)
_SMALLEST = ((128, 64, 1), (64, 32, 1))


def _guesses(p: Problem, t: Target) -> list[Config]:
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    order = "ascending" if p.mask == "none" else "longest_first"
    table = next(guesses for limit, guesses in _GUESSES if size <= limit)
    shaped = [
        Config({"tile_m": m, "tile_n": n, "stages": s, "overlap": True, "rescale": "deferred", "block_order": order})
        for m, n, s in (*table, *_SMALLEST)
    ]
    return [c for c in shaped if not any(k.check(p, t, c) for k in CONSTRAINTS)]


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare where masks or score changes take more than usual."""
    spare = OTHER_REGISTERS + (60 if p.mask == "intervals" or p.softcap or p.alibi else 0)
    guesses = _guesses(p, t)
    roomy = (c for c in guesses if fragment_registers(p, c) + spare <= CONSUMER_REGISTERS[int(c.tile_m) // 64])
    return next(roomy, guesses[-1])


FAMILY = Family(
    name="sm90_forward",
    template="sm90/forward.cu.j2",
    op="forward",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=_supports,
    derive=_derive,
    default=_default,
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=lambda p, c: {
        "wgmma_type": "bf16" if p.dtype == "bf16" else "f16",
        "shared_widths": [c.tile_n],
        "register_widths": [p.head_dim_v_padded],
    },
    seeds=_guesses,
    resources=lambda p, t, c: (smem_bytes(p, c), int(c.tile_m), fragment_registers(p, c)),
)
