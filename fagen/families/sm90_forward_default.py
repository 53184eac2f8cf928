"""What sm90_forward takes where no record is near, and where a search begins: by head dim, mask and size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

from fagen.families.base import Config
from fagen.families.reads import Test
from fagen.families.sm90_forward_block import OTHER_REGISTERS, consumer_registers, fragment_registers
from fagen.families.sm90_forward_cost import boundary_cycles, visit_cycles
from fagen.ops.attention.measures import AtMost
from fagen.ops.attention.problem import Problem
from fagen.ops.attention.size_point import has_few_rows, packed_heads
from fagen.ops.attention.tiling import ALONE, PACKED, UNPACKED, Cheaper, Short, Tiling
from fagen.target import Target

_Legal = Callable[[Problem, Target, Config], bool]
_Tile = tuple[int, int, int, int]  # tile_m, tile_n, q_stages, blocks_per_sm
_Tall = tuple[_Tile, int, bool]  # with stages, and whether P goes by shared memory
_Rival = tuple[Config, float]  # and how much slower it is held for than the model says

# By the larger head dim, the best first.
_TILES: tuple[tuple[int, tuple[_Tile, ...]], ...] = (
    (64, ((192, 128, 2, 1), (64, 64, 1, 3), (128, 128, 2, 1), (192, 96, 2, 1), (192, 112, 1, 1))),
    (96, ((128, 128, 2, 1), (192, 80, 1, 1), (192, 80, 2, 1), (128, 112, 2, 1))),
    (128, ((128, 128, 2, 1), (128, 160, 2, 1), (128, 176, 1, 1), (128, 112, 2, 1))),
    (192, ((128, 128, 1, 1), (128, 112, 1, 1), (128, 96, 2, 1), (128, 80, 1, 1))),
    (256, ((128, 64, 1, 1), (128, 80, 1, 1), (128, 48, 1, 1), (128, 32, 1, 1))),
)  # fmt: skip
_SHORT: dict[int, _Tile] = {64: (64, 64, 1, 3)}  # where rows see few keys, of which each sees another number
_FEW_KEYS = 2048
# Three warpgroups, the best where there are many keys, and by far for head dims that are multiples of 8 alone, which
# share kernels with the next multiple of 16; P goes by shared memory where registers have no room for it.
_THREE: dict[int, tuple[_Tall, ...]] = {
    80: (((192, 96, 1, 1), 3, False),),
    96: (((192, 128, 1, 1), 2, True),),
    112: (((192, 96, 1, 1), 3, False), ((192, 80, 1, 1), 3, False)),
    128: (((192, 128, 1, 1), 2, True), ((192, 96, 1, 1), 2, True)),
    144: (((192, 64, 1, 1), 3, False),),
    160: (((192, 64, 1, 1), 3, False), ((192, 64, 1, 1), 2, False)),
    176: (((192, 64, 1, 1), 2, True),),
    192: (((192, 64, 1, 1), 2, True),),
}
_BRIEF: dict[int, tuple[_Tall, ...]] = {128: (((192, 64, 1, 1), 3, False),)}  # where rows see few keys
_TALL_SECOND, _TALL_ONLY = (176, 192), (144, 160)  # three warpgroups beside two, and in the place of them
# Heads of odd multiples of 8 come slowly: with rows that all see the same keys two blocks load them for both, as where
# three warpgroups are second.
_SHARE_FULL = (208, 224, 240)
_THREE_FULL = _THREE | {96: (((192, 112, 2, 1), 2, False),), 144: (((192, 80, 1, 1), 2, False),)}
_FEW_ROWS: tuple[_Tile, ...] = ((64, 128, 1, 2), (64, 64, 1, 3))  # a tile a block
# (tile_n) by the larger head dim, where blocks share keys: one tile of rows, and two stages of keys
_SPLIT_TILE_N = ((128, 128), (192, 96), (256, 80))
_SMALLEST: tuple[_Tile, ...] = ((128, 64, 1, 1), (64, 32, 1, 1))  # with a single stage they fit every problem

_VERY_FEW_KEYS = AtMost("keys", 256)
_PACKS = AtMost("packed_heads", 1, tile=128)
_LEADS, _SECOND, _LAST = 1.0, 1.03, 1.035  # what the model says of rivals is multiplied by that
_SECOND_CAUSAL, _SECOND_TALL = 0.985, 0.95  # 128 rows beside 192, and 192 beside 128
_PACKED_VISIT, _PACKED_START = 0.98, 0.2  # of a visit: keys come from L2 less often, a tile of rows begins later
_BRIEF_CYCLES = 60_000  # to set a counter to zero is much beside them


def _config(tile: _Tile, stages: int, schedule: str, order: str, section: int) -> Config:
    m, n, q_stages, blocks = tile
    return Config(
        {
            "tile_m": m, "tile_n": n, "stages": stages, "q_stages": q_stages, "overlap": True,
            "rescale": "deferred", "ping_pong": m > 64, "blocks_per_sm": blocks, "schedule": schedule,
            "block_order": order, "section_mb": section, "cluster": 1, "shared_weights": False,
            "pack_heads": False, "splits": "none",
        }
    )  # fmt: skip


def guesses(p: Problem, t: Target, legal: _Legal) -> list[Config]:
    plans = _plans(p, p.seqlen_k < _FEW_KEYS)
    schedule = "balanced" if _VERY_FEW_KEYS.holds(p, t) else "single"
    alone = (schedule, "ascending" if p.mask == "none" else "longest_first", 32)
    dealt = _by_cost(p, t, _rivals(p, t, legal, p.seqlen_k < _FEW_KEYS))
    dealt += [_config(tile, 2, *plan) for plan in plans for tile in _tiles(p, p.seqlen_k < _FEW_KEYS)]
    single = [_config(tile, 2, *alone) for tile in _FEW_ROWS]
    shared = [_config(tile, 2, "single", "ascending", 32).replace(splits="keys") for tile in _split_tiles(p)]
    if not _PACKS.holds(p, t):
        shared = [c.replace(pack_heads=True) for c in shared] + shared
    shaped = [c for c in single if _few(p, t, c)] + dealt + single
    shaped = shared + shaped if has_few_rows(p, t) else shaped
    shaped += [_config(tile, 1, *plans[0]) for tile in _SMALLEST]
    return [c for c in dict.fromkeys(shaped) if legal(p, t, c)]


def _rivals(p: Problem, t: Target, legal: _Legal, few_keys: bool) -> list[_Rival]:
    """Legal tiles of which each is the cheapest at some sizes, and the same with heads packed."""
    plan, d, even = _plans(p, few_keys)[0], p.head_dim_padded, p.mask == "none"

    def tall(three: dict[int, tuple[_Tall, ...]]) -> list[Config]:
        return [_config(tile, stages, *plan).replace(shared_weights=by) for tile, stages, by in three.get(d, ())]

    threes, plain = tall(_THREE_FULL if even else _THREE), [_config(tile, 2, *plan) for tile in _tiles(p, few_keys)]
    if d in _TALL_SECOND:
        threes = _shared(threes) if even else threes
        ranked = [(threes if p.head_dim_v_padded > 128 else [], _SECOND_TALL), (plain, _LEADS)]
    elif d in _TALL_ONLY:
        ranked = [(threes, _LEADS)]
    else:
        plain = _shared(plain) if even and d in _SHARE_FULL else plain
        second = _SECOND_CAUSAL if p.mask == "causal" else _SECOND
        ranked = [(threes, _LEADS), (plain, second if threes else _LEADS)]
    if not even:
        ranked.append((tall(_BRIEF), _LAST))
    found = [(next(filter(functools.partial(legal, p, t), configs), None), slower) for configs, slower in ranked]
    alone = [(config, slower) for config, slower in found if config]
    return alone + [
        (c.replace(pack_heads=True), slower) for c, slower in alone if legal(p, t, c.replace(pack_heads=True))
    ]


def _shared(configs: list[Config]) -> list[Config]:
    """By two blocks that load keys and values for both."""
    return [config.replace(schedule="balanced", cluster=2) for config in configs]


def _tiling(p: Problem, c: Config, slower: float) -> Tiling:
    visit, start = visit_cycles(p, c) * slower, boundary_cycles(p, c) * slower
    packing = UNPACKED
    if c.pack_heads:
        packing, start = PACKED, start + visit * _PACKED_START
        visit *= 1.0 if p.mask == "none" else _PACKED_VISIT
    elif c.tile_m == 192 and p.head_dim_padded <= 128 and p.mask != "none":
        packing = ALONE  # heads that share keys have it packed, or another tile: a kernel less to build
    return Tiling(int(c.tile_m), int(c.tile_n), packing, round(visit), round(start))


def _by_cost(p: Problem, t: Target, rivals: list[_Rival]) -> list[Config]:
    """The cheapest first; where all is soon over, as a share of the tiles for each block, without a counter."""
    if not rivals:
        return []
    tilings = [_tiling(p, *rival) for rival in rivals]
    best = 0
    for other in range(1, len(rivals)):
        if not Cheaper(tilings[best], tilings[other]).holds(p, t):
            best = other
    cheapest, grouped = rivals[best][0], p.heads > p.kv_heads
    found = [cheapest, *(c for c, _ in rivals if grouped or not c.pack_heads)]
    if any(test.holds(p, t) for test in _brief(tilings)):
        order = "ascending" if p.mask == "none" else "longest_first"
        found.insert(0, cheapest.replace(schedule="balanced", block_order=order, section_mb=32))
    return found


def _brief(tilings: list[Tiling]) -> list[Short]:
    """Of the first rival, with heads packed or not: one of the two serves the size."""
    firsts = {each.packing == PACKED: each for each in reversed(tilings)}
    return [Short(each, _BRIEF_CYCLES) for each in firsts.values()]


def _tiles(p: Problem, few_keys: bool) -> list[_Tile]:
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    limit, tiles = next((limit, tiles) for limit, tiles in _TILES if size <= limit)
    first = _SHORT.get(limit) if p.mask != "none" and few_keys else None
    return list(dict.fromkeys([first, *tiles] if first else tiles))


def _plans(p: Problem, few_keys: bool) -> list[tuple[str, str, int]]:
    """(schedule, block_order, section_mb), the best first."""
    if p.mask == "none":
        return [("dynamic", "ascending", 32), ("dynamic", "sectioned", 32), ("balanced", "ascending", 32)]
    sections = (64, 32, 16) if p.head_dim_padded > 128 and not few_keys else (32, 64, 16)
    return [("dynamic", "sectioned", megabytes) for megabytes in sections]


def _split_tiles(p: Problem) -> list[_Tile]:
    size = max(p.head_dim_padded, p.head_dim_v_padded)
    n = next(n for limit, n in _SPLIT_TILE_N if size <= limit)
    return [(m, n, 1, 1) for m in ((64, 128) if _one_warpgroup(p) else (128, 64))]


def _one_warpgroup(p: Problem) -> bool:
    """Whether it can hold all rows of the heads that are packed."""
    return p.seqlen_q * packed_heads(p, 64) <= 64


def _few(p: Problem, t: Target, c: Config) -> bool:
    """Whether there is a block for each tile of rows."""
    return -(-p.seqlen_q // int(c.tile_m)) * p.heads * p.batch <= t.units * int(c.blocks_per_sm)


def default_reads(p: Problem, t: Target, legal: _Legal) -> tuple[Test, ...]:
    """What `guesses` asks of the sizes: few and very few keys, whether heads pack, how many rows, which plain tiles go
    round, and which of the rivals is the cheapest."""
    asked: list[Test] = [AtMost("keys", _FEW_KEYS - 1), _VERY_FEW_KEYS, _PACKS]
    asked += [AtMost("few_rows"), AtMost("packed_rows", 64, tile=64)]
    asked += [AtMost("row_blocks", t.units * by, tile=m) for m, _, _, by in _FEW_ROWS]
    for few_keys in (True, False):
        tilings = [_tiling(p, *rival) for rival in _rivals(p, t, legal, few_keys)]
        asked += [Cheaper(a, b) for a, b in itertools.combinations(tilings, 2)]
        asked += _brief(tilings)
    return tuple(dict.fromkeys(asked))


def default(p: Problem, t: Target, legal: _Legal) -> Config:
    """The first guess with registers to spare where slopes or random numbers take more than usual."""
    found = guesses(p, t, legal)

    def spare(c: Config) -> int:
        plain = p.mask in ("none", "causal") and not p.softcap and not c.shared_weights
        of_dropout = (8 if plain and p.head_dim_padded in (64, 96, 128) else 16) if p.dropout else 0
        return OTHER_REGISTERS + (16 if p.alibi else 0) + of_dropout

    roomy = (c for c in found if fragment_registers(p, c) + spare(c) <= consumer_registers(c))
    return next(roomy, found[-1])
