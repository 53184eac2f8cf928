"""Forward for Hopper with head dims above 256, up to 1024: K and V pass through one ring of stages, in chunks.

A block keeps its rows of q whole in shared memory. Two warpgroups share its work: the columns of O, or the rows.
"""

from __future__ import annotations

from fagen.families import device_limits
from fagen.families.base import Config, Constraint, Family, Knob, Value
from fagen.families.cost import key_bytes, makespan, walk
from fagen.families.reads import Reads
from fagen.ops.attention.measures import AtMost
from fagen.ops.attention.problem import Problem
from fagen.target import Target

FLAGS = ("-O3", "-std=c++17", "--use_fast_math", "-Xptxas=-v", "-lineinfo")

STAGES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)
KNOBS = (
    Knob(
        "groups_share", "kGroupsShare", ("columns", "rows"), "two warpgroups divide 64 rows' columns of O, or 128 rows"
    ),
    Knob("tile_n", "kTileN", (64, 96, 128, 192), "keys of a tile; where columns are shared, half are a warpgroup's"),
    Knob("chunk_d", "kChunkD", (64, 128), "columns of K that a stage holds"),
    Knob("stages", "kStages", STAGES, "chunks of K and V in shared memory"),
    Knob("chunks_ahead", "kChunksAhead", (0, 1, 2, 4), "chunks of the next K that are multiplied under a softmax"),
    Knob("in_flight", "kInFlight", (1, 2, 3), "chunks of scores whose products go on while the next one is waited for"),
    Knob("output_splits", "kOutputSplits", (1, 2), "blocks that share the columns of O; each computes all scores"),
    Knob("share_scores", "kShareScores", (False, True), "two such blocks are a cluster, with half of the scores each"),
    Knob("cluster", "kCluster", (1, 2, 4), "blocks that share each chunk of keys and values"),
    Knob("rescale", "kRescale", ("each", "deferred"), "when O follows a grown maximum"),
    Knob(
        "block_order",
        "kBlockOrder",
        ("ascending", "descending", "longest_first", "sectioned"),
        "order of row tiles and heads",
    ),
)

GROUP_ROWS = 64  # of q, a warpgroup's
THREADS = 384  # two warpgroups that compute, one that loads
CONSUMER_REGISTERS = 232
OTHER_REGISTERS = 36  # addresses, maxima and sums, loop state: what a thread needs beside its fragments
_SLAB, _ROW_BYTES = 64, 128  # columns of a slab, bytes of its row
_BARRIER_BYTES, _ALIGNMENT = 16, 1024


def _slabs(columns: int) -> int:
    return -(-columns // _SLAB)


def block_rows(c: Config) -> int:
    return GROUP_ROWS * (2 if c.groups_share == "rows" else 1)


def _block_keys(c: Config) -> int:
    """Keys of a tile whose scores a block computes."""
    return int(c.tile_n) // (2 if c.share_scores else 1)


def group_keys(c: Config) -> int:
    """Of these, a warpgroup's."""
    return _block_keys(c) // (1 if c.groups_share == "rows" else 2)


def group_columns(p: Problem, c: Config) -> int:
    """Columns of O that a warpgroup adds up, whole slabs."""
    of_block = -(-_slabs(p.head_dim_v_padded) // int(c.output_splits))
    return _SLAB * (of_block if c.groups_share == "rows" else -(-of_block // 2))


def block_columns(p: Problem, c: Config) -> int:
    return group_columns(p, c) * (1 if c.groups_share == "rows" else 2)


def _key_bytes(c: Config) -> int:
    """A chunk of K."""
    return _block_keys(c) * int(c.chunk_d) * 2


def value_keys(p: Problem, c: Config) -> int:
    """Keys of a chunk of V: as many as a chunk of K leaves room for, at least one product's."""
    n, row = int(c.tile_n), 2 * block_columns(p, c)
    return max(keys for keys in range(16, n + 1, 16) if n % keys == 0 and keys * row <= max(_key_bytes(c), 16 * row))


def _stage_bytes(p: Problem, c: Config) -> int:
    return max(_key_bytes(c), value_keys(p, c) * 2 * block_columns(p, c))


def smem_bytes(p: Problem, c: Config) -> int:
    of_rows = block_rows(c) * _ROW_BYTES * (_slabs(p.head_dim_padded) + _slabs(int(c.tile_n)))  # q, the weights
    barriers, exchange = _BARRIER_BYTES * (1 + c.stages + (8 if c.share_scores else 0)), 2 * GROUP_ROWS * 4
    return of_rows + c.stages * _stage_bytes(p, c) + barriers + exchange + _ALIGNMENT


def fragment_registers(p: Problem, c: Config) -> int:
    """O, S, and the next tile's S where that is begun ahead."""
    return group_columns(p, c) // 2 + group_keys(c) // 2 * (2 if c.chunks_ahead else 1)


def _chunks_whole(p: Problem, t: Target, c: Config) -> str | None:
    slabs, chunk = _slabs(p.head_dim_padded), int(c.chunk_d) // _SLAB
    return f"{slabs} slabs of 64 columns of q are no whole chunks of {chunk}" if slabs % chunk else None


def _ring_holds(p: Problem, t: Target, c: Config) -> str | None:
    chunks = _slabs(p.head_dim_padded) * _SLAB // int(c.chunk_d)
    if c.chunks_ahead > chunks:
        return f"chunks_ahead={c.chunks_ahead} of {chunks} chunks of K"
    if c.stages <= c.chunks_ahead + c.in_flight:
        return f"{c.stages} stages are all held: chunks_ahead={c.chunks_ahead} in_flight={c.in_flight}"
    return None


def _columns_shared(p: Problem, t: Target, c: Config) -> str | None:
    slabs, least = _slabs(p.head_dim_v_padded), int(c.output_splits) * (2 if c.groups_share == "rows" else 4)
    if c.output_splits > 1 and slabs < least:
        return f"{slabs} < {least} slabs of 64 columns of v are few for {c.output_splits} blocks"
    return None


def _scores_shared(p: Problem, t: Target, c: Config) -> str | None:
    if not c.share_scores:
        return None
    if c.output_splits != 2 or c.groups_share != "rows":
        return f"two blocks share scores of 128 rows: output_splits={c.output_splits} groups_share={c.groups_share}"
    if c.cluster > 1:
        return f"blocks that share scores have no chunks to share, cluster={c.cluster}"
    return f"half of {c.tile_n} keys is no slab of 64 weights, which is copied as it lies" if c.tile_n != 128 else None


def _smem_fits(p: Problem, t: Target, c: Config) -> str | None:
    need = smem_bytes(p, c)
    return f"{need} > {t.smem_per_block} bytes of shared memory on {t.arch}" if need > t.smem_per_block else None


def _registers_fit(p: Problem, t: Target, c: Config) -> str | None:
    need = fragment_registers(p, c) + OTHER_REGISTERS
    return f"about {need} > {CONSUMER_REGISTERS} registers a thread" if need > CONSUMER_REGISTERS else None


CONSTRAINTS = (
    Constraint("chunks_whole", _chunks_whole, ("chunk_d",)),
    Constraint("ring_holds", _ring_holds, ("chunk_d", "stages", "chunks_ahead", "in_flight")),
    Constraint("columns_shared", _columns_shared, ("groups_share", "output_splits")),
    Constraint("scores_shared", _scores_shared, ("groups_share", "tile_n", "output_splits", "share_scores", "cluster")),
    Constraint("order_matters", device_limits.order_matters, ("block_order",)),
    Constraint(
        "smem_fits", _smem_fits, ("groups_share", "tile_n", "chunk_d", "stages", "output_splits", "share_scores")
    ),
    Constraint(
        "registers_fit", _registers_fit, ("groups_share", "tile_n", "chunks_ahead", "output_splits", "share_scores")
    ),
)


def unsupported(p: Problem, t: Target, smaller: str) -> str | None:
    """Why a family of large head dims cannot serve the problem; `smaller` is the family of the others."""
    if not t.is_gpu or t.arch != "sm_90":
        return f"needs sm_90 (wgmma), the target is {t.arch}"
    if p.dtype not in ("fp16", "bf16"):
        return f"serves fp16 and bf16, not {p.dtype}"
    if not p.wider_than(256):
        return f"head dims of {max(p.head_dim, p.head_dim_v)} need no chunks: {smaller} takes up to 256"
    if p.dropout:
        return "it drops no weights"
    return None if p.aligned else "the copy engine needs rows that start at multiples of 16 bytes"


def _derive(p: Problem, t: Target, c: Config) -> dict[str, int]:
    return {
        "threads": THREADS,
        "smem_bytes": smem_bytes(p, c),
        "group_columns": group_columns(p, c),
        "value_keys": value_keys(p, c),
        "registers": CONSUMER_REGISTERS,
    }


def visit_cycles(p: Problem, c: Config) -> float:
    """Cycles, roughly, that a tile of keys takes of a block: shared memory, and what each chunk costs beside.

    A product reads 16 cycles for 64 x 16 of its first operand, copies write 128 bytes a cycle. Fitted to the times of
    fifteen configs at head dims 384 and 1024 on an H100, and to the defaults of five more head dims: 220 for a chunk,
    more where few bytes are in flight. The constants have no other reason.
    """
    n, columns, cluster = int(c.tile_n), group_columns(p, c), int(c.cluster)
    d, keys = _slabs(p.head_dim_padded) * _SLAB, group_keys(c)
    chunks = d // int(c.chunk_d) + n // value_keys(p, c)
    products = keys * d / 16 + n * columns / 16
    read = d / 8 * (16 + keys / 4) + n / 8 * (16 * -(-columns // 256) + columns / 4)
    loaded = (_block_keys(c) * d + n * block_columns(p, c)) * 2
    free = (c.stages - 1 - c.chunks_ahead / 2) * _stage_bytes(p, c) / 1024
    visit = max(products, read + loaded / 128) + 220 * chunks
    visit *= 1 + 0.003 * max(0.0, 96 - free)
    visit += 0.5 * columns if c.rescale == "each" else 0
    return max(visit * (1.1 if cluster == 4 else 1), loaded / cluster / 24)  # L2


_FEWEST_STAGES, _STAGES_AHEAD = 4, 6  # of guesses; from how many on some may be held for the next tile


def _deepest(p: Problem, t: Target, **values: Value) -> list[Config]:
    """That shape with as many stages as fit, chunks ahead if they are many; none if it is not legal."""
    shape: dict[str, Value] = {
        "groups_share": "columns", "tile_n": 64, "chunk_d": 64, "stages": 2, "chunks_ahead": 0, "in_flight": 1,
        "output_splits": 1, "share_scores": False, "cluster": 1, "rescale": "deferred",
        "block_order": "ascending" if p.mask == "none" else "longest_first",
    }  # fmt: skip

    def legal(config: Config) -> bool:
        return not any(constraint.check(p, t, config) for constraint in CONSTRAINTS)

    for stages in reversed(STAGES):
        plain = Config({**shape, **values, "stages": stages})
        if legal(plain):
            ahead = plain.replace(chunks_ahead=2)
            found = ahead if stages >= _STAGES_AHEAD and legal(ahead) else plain
            return [found.replace(cluster=2 if p.seqlen_q > block_rows(found) and not found.share_scores else 1)]
    return []


def _guesses(p: Problem, t: Target) -> list[Config]:
    """The best first, by the cycles of a row and key."""
    found = [
        config
        for n in (64, 128, 192)
        for chunk in (64, 128)
        for share in ("columns", "rows")
        for splits in (1, 2)
        for config in _deepest(p, t, groups_share=share, tile_n=n, chunk_d=chunk, output_splits=splits)
    ]

    def cycles(c: Config) -> tuple[bool, float]:
        of_tile = visit_cycles(p, c.replace(cluster=2)) * int(c.output_splits)
        return c.stages < _FEWEST_STAGES, of_tile / (int(c.tile_n) * block_rows(c))

    return sorted(found, key=cycles)


def _first_configs(p: Problem, t: Target) -> list[Config]:
    """Peers as well, which no default takes before they have run on a GPU."""
    peers: dict[str, Value] = {"groups_share": "rows", "tile_n": 128, "output_splits": 2, "share_scores": True}
    shared = [config for chunk in (128, 64) for config in _deepest(p, t, **peers, chunk_d=chunk)]
    return [*shared, *_guesses(p, t)[:4]]


def _default(p: Problem, t: Target) -> Config:
    """The first guess with registers to spare: intervals take more than usual, the more keys a warpgroup has."""

    def spare(c: Config) -> int:
        if p.mask != "intervals":
            return 0
        return 16 + max(0, group_keys(c) - 64) + (24 if c.output_splits > 1 else 0)

    guesses = _guesses(p, t)
    roomy = (c for c in guesses if fragment_registers(p, c) + OTHER_REGISTERS + spare(c) <= CONSUMER_REGISTERS)
    return next(roomy, guesses[-1])


def cost(p: Problem, t: Target, c: Config) -> float:
    """Cycles, roughly: visits of tiles of keys, the boundaries between tiles of rows, the tail."""
    cluster, rows = int(c.cluster), block_rows(c)
    seen, heads = walk(p, rows * cluster, int(c.tile_n)), p.batch * p.heads * int(c.output_splits)
    visit = visit_cycles(p, c)
    boundary = 4000 + 4.0 * group_columns(p, c) + rows * p.head_dim_padded * 2 / 24
    uneven = seen.most * seen.row_tiles > seen.visits
    tail = 0.15 if not uneven or c.block_order in ("longest_first", "sectioned") else 0.5
    work = heads * (seen.visits * visit + seen.row_tiles * boundary)
    total = makespan(work, seen.most * visit + boundary, heads * seen.row_tiles, t.units // cluster, tail)
    return total * (1.02 if c.block_order == "longest_first" and key_bytes(p) > t.l2 else 1)


def _widths(p: Problem, c: Config) -> list[int]:
    """Of a warpgroup's products on V."""
    slabs = group_columns(p, c) // _SLAB
    first = -(-slabs // -(-slabs // 4))
    return sorted({_SLAB * first, _SLAB * (slabs - first)} - {0})


FAMILY = Family(
    name="sm90_forward_large",
    template="sm90/forward_large.cu.j2",
    op="forward",
    dtypes=("fp16", "bf16"),
    knobs=KNOBS,
    constraints=CONSTRAINTS,
    supports=lambda p, t: unsupported(p, t, "sm90_forward"),
    derive=_derive,
    default=_default,
    # whether a cluster has work
    default_reads=Reads(lambda p, t: (AtMost("rows", GROUP_ROWS), AtMost("rows", 2 * GROUP_ROWS))),
    flags=lambda t: ("-gencode=arch=compute_90a,code=sm_90a", *FLAGS),
    context=lambda p, c: {
        "wgmma_type": "bf16" if p.dtype == "bf16" else "f16",
        "shared_widths": [group_keys(c)],
        "column_widths": _widths(p, c),
        "register_widths": [],
    },
    first_configs=_first_configs,
    repeats=lambda p, c: c.cluster > 1 and p.seqlen_q <= block_rows(c) * (int(c.cluster) // 2),
    cost=cost,
    resources=lambda p, t, c: (smem_bytes(p, c), c.cluster, fragment_registers(p, c)),
)
