"""A block of sm90_backward: its shared memory and registers."""

from __future__ import annotations

from fagen.families.base import Config
from fagen.ops.attention.problem import Problem

ROW_BYTES = 128  # of a slab of 64 columns
BARRIER_BYTES = 16  # a full and an empty barrier
SMEM_ALIGNMENT = 1024
PIECE_BYTES = 2048  # 8 columns of 64 rows of dQ in float32
OTHER_REGISTERS = 24  # addresses, bounds, loop state


def _slabs(columns: int) -> int:
    return -(-columns // (ROW_BYTES // 2))


def dq_owners(c: Config) -> int:
    return int(c.warpgroups) if c.dq_owner == "all" else 1


def dq_columns(p: Problem, c: Config) -> int:
    """Columns of dQ that a warpgroup has at a time, as DqShare in sm90/backward/layout.cuh shares them."""
    if c.dq_owner == "loader":
        return 32
    if c.operands == "shared":
        return 64
    if int(c.tile_m) // 64 % dq_owners(c) == 0:
        return p.head_dim_padded
    return -(-_slabs(p.head_dim_padded) // dq_owners(c)) * 64


def consumer_registers(c: Config) -> int:
    """Of a thread that computes: what the producing warpgroup leaves of the SM's registers."""
    groups = int(c.warpgroups)
    each = 65536 // (128 * (groups + 1)) // 8 * 8
    rounds = c.dq_rounding == "last_block" and c.tile_m == 64
    producer = 32 if groups == 3 else 56 if rounds or c.dq_owner == "loader" else 40
    return min(240, ((groups + 1) * each - producer) // groups // 8 * 8)


def tile_bytes(p: Problem, c: Config) -> int:
    """Of k, v, and the stages of q, dO and dS."""
    m, n = int(c.tile_m), int(c.tile_n)
    slabs, slabs_v = _slabs(p.head_dim_padded), _slabs(p.head_dim_v_padded)
    rows = n * (slabs + slabs_v) + c.q_stages * m * slabs + c.dout_stages * m * slabs_v
    return (rows + c.ds_stages * m * _slabs(n) * (2 if c.operands == "shared" else 1)) * ROW_BYTES


def smem_bytes(p: Problem, c: Config) -> int:
    m, n = int(c.tile_m), int(c.tile_n)
    dq = dq_owners(c) * dq_columns(p, c) // 8 * PIECE_BYTES if c.dq_sink == "bulk" else 0
    stats = 4 * m * 2 * c.q_stages
    bounds = 16 * n + 32 if p.mask == "intervals" else 0
    rounds = c.dq_rounding == "last_block"
    of_dq = c.ds_stages if c.dq_owner == "loader" else c.warpgroups * (1 + rounds)
    barriers = BARRIER_BYTES * (2 + c.q_stages + c.dout_stages + of_dq)
    return tile_bytes(p, c) + dq + stats + bounds + barriers + SMEM_ALIGNMENT


def fragment_registers(p: Problem, c: Config) -> int:
    """dK and dV, and beside them S and dP, or dQ and what of P and dS are operands."""
    m, n, groups = int(c.tile_m), int(c.tile_n), int(c.warpgroups)
    if c.operands == "shared":
        chunks = sum(-(-_slabs(d) // groups) for d in (p.head_dim_padded, p.head_dim_v_padded))
        scores = m * n // (64 * groups) * (3 if p.softcap else 2) // 2
        return chunks * n // 2 + max(scores, 32)
    scores = m // 2 * (3 if p.softcap else 2)
    held = p.head_dim_v_padded // 4 + 8 if c.v_source == "registers" else 0  # 8: without them ptxas spills at the edge
    held += 0 if c.dv_start == "after_store" else m // 4 + 8  # P for dV beside dS: else products wait for each other
    dq = 0 if c.dq_owner == "loader" else dq_columns(p, c) // 2
    return held + (p.head_dim_padded + p.head_dim_v_padded) // 2 + max(scores, m // 2 + dq)
