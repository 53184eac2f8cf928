"""What dealing tiles of rows to blocks costs, by count: visits of tiles of keys, and one for each tile of rows.

    python benchmarks/dealing.py

A ratio is the time until the last of 132 blocks is done over an even division. Sections are dealt one after the other,
in each the longest tiles of rows first. Taken early: a block takes its next tile of rows when it begins the present
one, as `sm90_forward` does; late: when it ends it. The last table counts visits that a warpgroup makes of tiles of keys
that none of its own 64 rows sees, as a share of those that it must make.
"""

from __future__ import annotations

import heapq

from fagen.bench.suites import DOCUMENTS

BLOCKS, BOUNDARY = 132, 1.0


def causal(length: int, rows: int, keys: int) -> list[float]:
    return [-(-min(m + rows, length) // keys) + BOUNDARY for m in range(0, length, rows)]


def documents(rows: int, keys: int, full: bool) -> list[float]:
    ends = [(min(m + rows, n), n) for n in DOCUMENTS for m in range(0, n, rows)]
    return [-(-(n if full else end) // keys) + BOUNDARY for end, n in ends]


def sectioned(tiles: list[float], heads: int, at_once: int) -> list[float]:
    order = sorted(tiles, reverse=True)
    return [tile for head in range(0, heads, at_once) for tile in order for _ in range(min(at_once, heads - head))]


def late(order: list[float]) -> float:
    ends = [0.0] * BLOCKS
    for tile in order:
        heapq.heappush(ends, heapq.heappop(ends) + tile)
    return max(ends)


def early(order: list[float]) -> float:
    waiting = iter(order[BLOCKS:])
    begins = [(0.0, block, tile) for block, tile in enumerate(order[:BLOCKS])]  # of the present tiles
    last = 0.0
    while begins:
        begin, block, tile = heapq.heappop(begins)
        end, following = begin + tile, next(waiting, None)
        last = max(last, end)
        if following is not None:
            heapq.heappush(begins, (end, block, following))
    return last


def balanced(order: list[float]) -> float:
    loads = [0.0] * BLOCKS
    for index, tile in enumerate(order):
        turn, place = divmod(index, BLOCKS)
        loads[BLOCKS - 1 - place if turn % 2 else place] += tile
    return max(loads)


def unseen(length: int, rows: int, keys: int) -> float:
    made = needed = 0
    for m in range(0, length, rows):
        for first in range(m, min(m + rows, length), 64):
            made += -(-min(m + rows, length) // keys)
            needed += -(-min(first + 64, length) // keys)
    return made / needed - 1


ROWS = {
    "documents of 16k, causal": (documents(128, 128, False), 16, 4),
    "documents of 16k, full": (documents(128, 128, True), 16, 4),
    "d128 causal s8192, 32 heads": (causal(8192, 128, 128), 32, 8),
    "d256 causal s8192, 16 heads": (causal(8192, 128, 64), 16, 8),
    "d128 causal s1024, 32 heads": (causal(1024, 128, 128), 32, 32),
    "d256 causal s3072, 8 heads": (causal(3072, 128, 64), 8, 8),
}

if __name__ == "__main__":
    print(f"{'row':30}  early   late  balanced")
    for name, (tiles, heads, at_once) in ROWS.items():
        order = sectioned(tiles, heads, at_once)
        even = sum(order) / BLOCKS
        print(f"{name:30} {early(order) / even:6.3f} {late(order) / even:6.3f} {balanced(order) / even:9.3f}")
    print("visits for nothing, 192 rows on 128 keys:")
    for length in (2048, 8192):
        print(f"{f'causal s{length}':30} {unseen(length, 192, 128):6.1%}")
