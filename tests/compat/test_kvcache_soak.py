"""Many random steps on one paged cache: sequences come, grow, share steps and leave; each step against float64."""

from __future__ import annotations

import random

import torch

import fagen
from tests.compat.test_kvcache import HEADS, KV_HEADS, D, attended, close, int32

STEPS, PAGE, PAGES, LONGEST = 300, 16, 40, 150


class Live:
    """A sequence: its pages, and its rows in float32 as they were given."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.k = self.v = torch.zeros(0, KV_HEADS, D)

    def grow(self, k: torch.Tensor, v: torch.Tensor, free: list[int]) -> None:
        self.k, self.v = torch.cat([self.k, k]), torch.cat([self.v, v])
        while len(self.pages) * PAGE < len(self.k):
            self.pages.append(free.pop())


def test_sequences_come_grow_and_leave() -> None:
    chance, numbers = random.Random(7), torch.Generator().manual_seed(7)
    cache = [torch.full((PAGES, PAGE, KV_HEADS, D), float("nan")) for _ in range(2)]
    free, live = list(range(PAGES)), [Live()]
    kinds = set()

    def rows(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, D, generator=numbers)

    for step in range(STEPS):
        if chance.random() < 0.3 or not live:
            live.append(Live())
        for gone in [s for s in live if len(s.k) > LONGEST or chance.random() < 0.02]:
            live.remove(gone)
            free += gone.pages
        chance.shuffle(free)
        some = chance.sample(live, chance.randint(0, min(len(live), 5)))
        counts = [1 if step % 2 else chance.randint(1, 20) for _ in some]
        before = [len(s.k) for s in some]
        if (
            sum(-(-(n + c) // PAGE) - -(-n // PAGE) for n, c in zip(before, counts, strict=True)) > len(free)
            or not some
        ):
            if live:  # no room: the oldest leaves
                free += live.pop(0).pages
            continue
        new = [(rows(n, HEADS), rows(n, KV_HEADS), rows(n, KV_HEADS)) for n in counts]
        for s, (_, k, v) in zip(some, new, strict=True):
            s.grow(k, v, free)
        width = max(len(s.pages) for s in some)
        table = torch.tensor([s.pages + [-1] * (width - len(s.pages)) for s in some], dtype=torch.int32)
        q, k, v = (torch.cat(parts) for parts in zip(*new, strict=True))
        starts = int32(*(sum(counts[:i]) for i in range(len(counts) + 1)))
        pinned = step % 5 == 0
        out, lse = fagen.flash_attn_with_kvcache(
            q, *cache, k, v, cache_seqlens=int32(*before), page_table=table, cu_seqlens_q=starts,
            cu_seqlens_k_new=starts, max_seqlen_q=max(counts), causal=True, return_softmax_lse=True,
            numerics="pinned" if pinned else "tuned", num_splits=0 if pinned else chance.randint(0, 4),
        )  # fmt: skip
        kinds.add((len(some), max(counts) == 1, pinned))
        for i, s in enumerate(some):
            mine = slice(int(starts[i]), int(starts[i + 1]))
            want, want_lse = attended(q[mine], s.k, s.v, causal=True)
            close(out[mine], want)
            close(lse[:, mine], want_lse)
    assert len(kinds) > 12
    held = sorted([*free, *(page for s in live for page in s.pages)])
    assert held == list(range(PAGES))
    for s in live:  # nobody wrote into another's pages
        for which, kept in enumerate((s.k, s.v)):
            found = cache[which][torch.tensor(s.pages, dtype=torch.int64)].flatten(0, 1)[: len(kept)]
            assert torch.equal(found, kept)
