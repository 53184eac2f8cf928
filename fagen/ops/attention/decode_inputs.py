"""The inputs of decode that are timed and verified: a cache whose unused rows hold NaN, permuted pages, guards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch

from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.attention.decode_problem import KV_TORCH_DTYPES, DecodeProblem
from fagen.ops.attention.inputs import SOFTCAP
from fagen.ops.attention.problem import TORCH_DTYPES
from fagen.ops.inputs import Inputs, guarded
from fagen.target import Target

_NO_PAGE = 0x7FFFFFF0  # an entry of the page table that is no page
_SPLITS = (0, 3, 1, -64)  # of varied calls: by rule, more than some sequences have keys for, none, of fixed size


def make(problem: DecodeProblem, device: Any, seed: int, varied: bool) -> Inputs:
    """Every sequence has `seqlen_q` rows and `seqlen_k` keys, its pages lie in any order.

    `varied`: lengths at the edges of tiles and pages, 0 among them; rows of NaN in the cache behind each length, and
    whole pages of it that no sequence has; entries of the page table that are no page; splits of several kinds; with
    an odd batch and several rows packed rows of several lengths, else sequences that lie in any order in the cache.
    """
    random = Random(seed)
    lengths = _lengths(problem, random) if varied else [problem.seqlen_k] * problem.batch
    ragged = varied and problem.batch % 2 == 1 and problem.seqlen_q > 1
    counts = _row_counts(problem, random) if ragged else None
    return _make(problem, device, random, seed, lengths, counts, varied)


def of_steps(problem: DecodeProblem, device: Any, seed: int, steps: Sequence[tuple[int, int]]) -> Inputs:
    """Each sequence has its own number of rows and keys; where some have several rows, all are packed."""
    counts, lengths = ([step[i] for step in steps] for i in (0, 1))
    packed = None if set(counts) == {problem.seqlen_q} else counts
    return _make(problem, device, Random(seed), seed, lengths, packed, varied=False)


def _make(
    problem: DecodeProblem, device: Any, random: Random, seed: int, lengths: list[int], counts: list[int] | None,
    varied: bool,
) -> Inputs:  # fmt: skip
    """`counts` are the rows of packed sequences; None: each has `seqlen_q`."""
    p = problem
    where = torch.device(("cuda" if device.is_gpu else "cpu") if isinstance(device, Target) else device)
    numbers = torch.Generator(where).manual_seed(seed)

    def held(dim: int) -> int:
        return dim if p.aligned else dim + 1  # a row of one element more than it shows starts anywhere

    dtype = getattr(torch, TORCH_DTYPES[p.dtype])
    leading = (p.batch, p.seqlen_q) if counts is None else (sum(counts),)
    q = torch.randn((*leading, p.heads, held(p.head_dim)), generator=numbers, dtype=dtype, device=where)
    unused = math.nan if varied else 0.0  # what is timed is given to peers as well, which may read on
    table, chosen = _places(p, lengths, random, varied)
    k = _cache(p, p.head_dim, held(p.head_dim), table, chosen, lengths, numbers, where, unused)
    v = k[..., : p.head_dim_v]
    if not p.shared_kv:
        v = _cache(p, p.head_dim_v, held(p.head_dim_v), table, chosen, lengths, numbers, where, unused)

    def integers(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=where)

    def scales() -> torch.Tensor | None:
        if not p.kv_dtype:
            return None
        return torch.rand((p.batch, p.kv_heads), generator=numbers, device=where) + 0.5

    call = DecodeCall(
        q[..., : p.head_dim], k, v, integers(lengths),
        page_table=integers(table) if p.page else None,
        cu_seqlens_q=None if counts is None else integers([0, *itertools.accumulate(counts)]),
        cache_batch_idx=integers([pages[0] for pages in table]) if varied and not p.page else None,
        k_scale=scales(), v_scale=scales(),
        sinks=torch.randn(p.heads, generator=numbers, device=where) if p.sinks else None,
        window=(p.window_left, p.window_right), softcap=SOFTCAP if p.softcap else 0.0,
        num_splits=_SPLITS[(p.batch + p.seqlen_k) % len(_SPLITS)] if varied else 0,
        most_rows=0 if counts is None else p.seqlen_q, most_keys=p.seqlen_k,
    )  # fmt: skip
    types = call.output_types()
    rooms = {
        "out": guarded(types["out"][0], dtype, where, pitch=held(p.head_dim_v)),
        "lse": guarded(*types["lse"], where),
    }
    return Inputs.of(call, rooms)


def edges(p: DecodeProblem) -> list[int]:
    """Lengths at which kernels go wrong: none, one, around pages and tiles of keys."""
    around = {n + d for n in (p.page or 16, 64, 128) for d in (-1, 0, 1)}
    return sorted(n for n in {0, 1, 2, *around, p.seqlen_k - 1} if 0 <= n < p.seqlen_k)


def _lengths(p: DecodeProblem, random: Random) -> list[int]:
    """One sequence has all keys; the others edges first, in any order, then anything."""
    some = edges(p)
    random.shuffle(some)
    some += [random.randint(0, p.seqlen_k) for _ in range(p.batch)]
    found = [p.seqlen_k, *some[: p.batch - 1]]
    random.shuffle(found)
    return found


def _row_counts(p: DecodeProblem, random: Random) -> list[int]:
    """One sequence has all rows, the others any number of them, none as well."""
    found = [p.seqlen_q, *(random.randint(0, p.seqlen_q) for _ in range(p.batch - 1))]
    random.shuffle(found)
    return found


def _places(p: DecodeProblem, lengths: list[int], random: Random, varied: bool) -> tuple[list[list[int]], int]:
    """The pages of each sequence, in any order, and how many there are; a third more than are used if `varied`."""
    size = p.page or p.seqlen_k
    width = -(-p.seqlen_k // size)
    used = [-(-length // size) if p.page else width for length in lengths]
    pages = sum(used) + (sum(used) // 3 + 1 if varied else 0)
    order = list(range(pages))
    if varied or p.page:
        random.shuffle(order)
    ends = list(itertools.accumulate(used))
    mine = (order[end - count : end] for end, count in zip(ends, used, strict=True))
    rest = [_NO_PAGE if varied else 0]
    return [some + rest * (width - len(some)) for some in mine], pages


def _cache(
    p: DecodeProblem, dim: int, held: int, table: list[list[int]], pages: int, lengths: list[int],
    numbers: torch.Generator, where: torch.device, unused: float,
) -> torch.Tensor:  # fmt: skip
    """`unused` but for the keys of the sequences."""
    size = p.page or p.seqlen_k
    dtype = getattr(torch, KV_TORCH_DTYPES[p.kv_dtype] if p.kv_dtype else TORCH_DTYPES[p.dtype])
    cache = torch.full((pages, size, p.kv_heads, held), unused, dtype=dtype, device=where)
    rows = cache.view(pages * size, p.kv_heads, held)
    for mine, length in zip(table, lengths, strict=True):
        key = torch.arange(length, device=where)
        at = torch.tensor(mine, device=where)[key // size] * size + key % size
        values = torch.randn((length, p.kv_heads, held), generator=numbers, device=where)
        rows[at] = values.to(dtype)
    return cache[..., :dim]
