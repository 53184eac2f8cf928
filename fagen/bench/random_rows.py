"""Random problems that nobody tuned: a standing test of defaults, of dispatch and of what is between the lengths.

The list follows from the seed alone, on any machine: a generator of our own, and arithmetic in whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fagen.bench.rows import Row
from fagen.ops.attention.problem import Problem

ROWS = 60
LENGTHS = (64, 11000)
HEAD_DIMS = tuple(range(32, 257, 8))
MOST_FLOPS, MOST_BYTES, MOST_BATCH = 10**12, 1 << 30, 64
_MASKS = ("none", "none", "causal", "causal", "window")
_KV_HEADS, _GROUPS, _MOST_HEADS = (1, 2, 4, 8, 16, 32), tuple(range(1, 9)), 64
_DOUBLING = 1024  # parts of chance for each doubling of a length

T = TypeVar("T")


class Dice:
    """splitmix64: the same numbers everywhere."""

    def __init__(self, seed: int) -> None:
        self.state = seed % (1 << 64)

    def below(self, count: int) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % (1 << 64)
        word = self.state
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
        word = (word ^ word >> 27) * 0x94D049BB133111EB % (1 << 64)
        return (word ^ word >> 31) * count >> 64

    def pick(self, among: Sequence[T]) -> T:
        return among[self.below(len(among))]

    def length(self, least: int, most: int) -> int:
        """Odd, and each doubling as likely as the next."""
        lows = [least << n for n in range((most // least).bit_length())]
        spans = [(low, min(2 * low, most) - low) for low in lows]
        place = self.below(sum(_DOUBLING * width // low for low, width in spans))
        for low, width in spans:
            share = _DOUBLING * width // low
            if place < share:
                break
            place -= share
        return (low + self.below(width)) // 2 * 2 + 1


def suite(seed: int) -> list[Row]:
    dice = Dice(seed)
    return [_row(number, dice) for number in range(ROWS)]


def _row(number: int, dice: Dice) -> Row:
    mask, kv_heads = dice.pick(_MASKS), dice.pick(_KV_HEADS)
    group = dice.pick([g for g in _GROUPS if g * kv_heads <= _MOST_HEADS])
    seqlen_q = seqlen_k = dice.length(*LENGTHS)
    if dice.below(2):
        seqlen_k = dice.length(*LENGTHS)
    if mask != "none":  # rows without a key are no work
        seqlen_q, seqlen_k = sorted((seqlen_q, seqlen_k))
    left = dice.length(16, 4096) if mask == "window" else -1
    one = Problem(
        head_dim=dice.pick(HEAD_DIMS), mask=mask, heads=kv_heads * group, kv_heads=kv_heads, seqlen_q=seqlen_q,
        seqlen_k=seqlen_k, window_left=left, window_right=0 if mask == "window" else -1,
    )  # fmt: skip
    problem = one.replace(batch=_batch(one, dice))
    seen = f"window{left}" if mask == "window" else "full" if mask == "none" else mask
    heads, length = f"h{one.heads}/{kv_heads}", f"q{seqlen_q} k{seqlen_k}"
    return Row(f"random-{number:02} d{one.head_dim} {seen} b{problem.batch} {heads} {length}", problem, "random")


def _batch(one: Problem, dice: Dice) -> int:
    """As large as the bounds allow, or half, a quarter, ... of that."""
    size = one.itemsize * (one.heads * one.seqlen_q + one.kv_heads * one.seqlen_k) * 2 * one.head_dim
    most = max(1, min(MOST_BATCH, MOST_BYTES // size, MOST_FLOPS // int(one.flops())))
    return max(1, most >> dice.below(most.bit_length()))
