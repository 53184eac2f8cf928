"""Host time of `fagen.flash_attn_with_kvcache` on the CPU, at sizes whose kernel takes next to nothing: CPU time of the
thread, so that other work on the machine counts little.

python benchmarks/decode_host.py
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

import fagen

ROUNDS, CALLS = 25, 100


def microseconds(call: Callable[[], object]) -> str:
    call()
    rounds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        rounds.append((time.thread_time() - start) / CALLS * 1e6)
    return f"median {statistics.median(rounds):6.1f} us, fastest round {min(rounds):6.1f}, slowest {max(rounds):6.1f}"


def main() -> None:
    torch.set_num_threads(1)  # the kernel as well: no thread is woken
    q, new = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    cache, pages = torch.randn(1, 64, 1, 16), torch.randn(4, 16, 1, 16)
    lengths, table = torch.tensor([2], dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32)
    step = fagen.flash_attn_with_kvcache
    grown = itertools.cycle([cache[:, : n + 2] for n in range(60)])
    wide = torch.randn(1, ROUNDS * CALLS + 100, 1, 16)
    unseen, longer = (iter([wide[:, : n + 64] for n in range(ROUNDS * CALLS + 1)]) for _ in range(2))
    cos, sin = torch.randn(64, 8), torch.randn(64, 8)

    def next_shape() -> object:
        shown = next(grown)
        return step(q, shown, shown, cache_seqlens=lengths, causal=True)

    def unseen_shape() -> object:
        shown = next(unseen)
        return step(q, shown, shown, cache_seqlens=lengths, causal=True)

    def unseen_append() -> object:
        shown = next(longer)
        return step(q, shown, shown, new, new, cache_seqlens=lengths, causal=True)

    calls: dict[str, Callable[[], object]] = {
        "contiguous": lambda: step(q, cache, cache, cache_seqlens=lengths, causal=True),
        "paged": lambda: step(q, pages, pages, cache_seqlens=lengths, page_table=table, causal=True),
        "paged, with LSE": lambda: step(q, pages, pages, cache_seqlens=lengths, page_table=table, causal=True,
                                        return_softmax_lse=True),
        "append": lambda: step(q, cache, cache, new, new, cache_seqlens=lengths, causal=True),
        "append, rotary": lambda: step(q, cache, cache, new, new, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths,
                                       causal=True),
        "60 shapes in turn": next_shape,
        "a shape never seen": unseen_shape,
        "the same, append": unseen_append,
    }  # fmt: skip
    for name, call in calls.items():
        print(f"{name:<20} {microseconds(call)}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
