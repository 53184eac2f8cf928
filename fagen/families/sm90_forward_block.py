"""A block of sm90_forward: the shared memory and the registers that its config takes."""

from __future__ import annotations

from fagen.families.base import Config
from fagen.ops.attention.problem import Problem

# Shared memory, as sm90/smem_layout.cuh names it.
ROW_BYTES = 128  # of a slab of 64 columns
BARRIER_BYTES = 16  # of a stage: its full and its empty barrier
QUEUE_BYTES = 2 * (32 + BARRIER_BYTES)  # two assignments
TILE_MASK_BYTES = 2 * 48  # of a stage of keys: two masks
SMEM_ALIGNMENT = 1024

OTHER_REGISTERS = 24  # addresses, maxima and sums, loop state
FEWEST_REGISTERS = 64  # that are too few for any product


def registers_each(c: Config) -> int:
    """What the block is compiled for, before roles divide it."""
    return 65536 // (int(c.blocks_per_sm) * (2 * int(c.tile_m) + 128)) // 8 * 8


def consumer_registers(c: Config) -> int:
    """Of a thread that computes: what the producing warpgroup leaves of the block's part of the SM."""
    groups, each = int(c.tile_m) // 64, registers_each(c)
    producer = 32 if groups == 3 else 40
    return min(240, ((groups + 1) * each - producer) // groups // 8 * 8)


def _slabs(columns: int) -> int:
    return -(-columns // (ROW_BYTES // 2))


def smem_bytes(p: Problem, c: Config) -> int:
    slabs, slabs_v = _slabs(p.head_dim_padded), _slabs(p.head_dim_v_padded)
    tiles = c.q_stages * c.tile_m * slabs + c.stages * c.tile_n * (slabs + slabs_v)
    tiles += c.tile_m * _slabs(int(c.tile_n)) if c.shared_weights else 0
    barriers = BARRIER_BYTES * (c.q_stages + 2 * c.stages)
    return tiles * ROW_BYTES + barriers + QUEUE_BYTES + TILE_MASK_BYTES * c.stages + SMEM_ALIGNMENT


def fragment_registers(p: Problem, c: Config) -> int:
    """S, the weights on their way if they are held there, and O."""
    return int(c.tile_n) // 2 + (0 if c.shared_weights else int(c.tile_n) // 4) + p.head_dim_v_padded // 2
