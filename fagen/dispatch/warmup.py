"""What a model may ever ask for, and compiling it before it does.

The config of a size is that of the nearest record, so that the configs which sizes up to a bound can get are those of
the records whose cells reach into the bound. Distances add up over features: a record that is the nearest anywhere
among sizes that differ in their number of keys alone is the nearest where that number is as close to its own as it can
be. Rows and batches are gone through; where nothing is recorded of a regime, or the nearest record only confirms its
family's default, defaults are asked for a grid of sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from random import Random
from typing import TYPE_CHECKING, Any

from fagen import env, families
from fagen.build.compilers import compile_workers
from fagen.codegen.spec import KernelSpec, Key
from fagen.db import store
from fagen.dispatch import choose, kernels, resolve
from fagen.errors import FagenError, InvalidArgument
from fagen.families import Reads
from fagen.ops.attention import derivatives, size_point
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.measures import AtMost
from fagen.ops.attention.problem import Problem
from fagen.ops.attention.tiling import Cheaper
from fagen.runtime import append, binding, packed
from fagen.target import Target

if TYPE_CHECKING:
    import torch

    from fagen.db.record import Record
    from fagen.families import Family
    from fagen.runtime.helper import Helper

    _Recorded = tuple[bool, Record]  # and whether it was tuned on another device

_GRID = 8  # sizes a doubling, of the grid for defaults
_COARSE = 12  # every so many numbers of keys, where there are several sequences and records
_SCATTERED, _MOST_BATCH = 12_000, 256
MOST_SEQLEN = 1 << 24


def sizes(problem: Problem, target: Target, most: int) -> list[Problem]:
    """Sizes that get, among them, every kernel that any size gets.

    Of the problem's static key, heads and window; of any batch, and of up to `most` rows and keys; with the mask
    causal, of no more rows than keys.
    """
    if not 1 <= most <= MOST_SEQLEN:
        raise InvalidArgument(f"a longest sequence of {most} is out of range", f"1 to {MOST_SEQLEN}")
    able, refusals = families.serving(problem, target)
    usable = [
        (provenance == "arch", record)
        for record, provenance in store.Database.load().candidates(problem, target, every_regime=True)
        if size_point.shares_keys(record.problem, target) == size_point.shares_keys(problem, target)
        and not choose.by_record(record, provenance, problem, target, able, refusals)[1]
    ]
    found: list[Problem] = []
    recorded: dict[bool, list[_Recorded]] = {}
    for few in (False, True):
        records = [(elsewhere, r) for elsewhere, r in usable if size_point.has_few_rows(r.problem, target) == few]
        if records:
            recorded[few] = sorted(records, key=lambda pair: (pair[0], pair[1].key, pair[1].seconds))
            found += _by_record(problem, target, most, recorded[few], few)
        else:
            found += [p for p in _by_default(problem, target, most) if size_point.has_few_rows(p, target) == few]
    return found + _by_confirmed(problem, target, most, recorded)


def _rows(most: int) -> list[int]:
    """Both ends of every block of rows, and all short sequences."""
    block = size_point.WAVE_ROWS
    ends = (n for first in range(0, most, block) for n in (first + 1, first + block))
    return sorted({min(n, most) for n in (*range(1, min(most, 8 * block) + 1), *ends)})


def _batches(problem: Problem, target: Target, rows: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Batches, and the lengths for which one more sequence still counts."""
    batch = 1
    while rows:
        yield batch, rows
        waves = (batch * problem.heads * -(-n // size_point.WAVE_ROWS) / max(1, target.units) for n in rows)
        rows = [n for n, w in zip(rows, waves, strict=True) if w < size_point.MOST_WAVES]
        batch += 1


def _by_record(problem: Problem, target: Target, most: int, records: list[_Recorded], few: bool) -> list[Problem]:
    """For each record that is the nearest of some size, such a size; of those with few rows, or of the others."""
    import torch

    keys, waves, rows = _points([r.problem for _, r in records], target).unbind(1)
    farther = _farther(records)
    weight = size_point.WEIGHTS
    found: dict[int, Problem] = {}
    for batch, lengths in _batches(problem, target, _rows(most)):
        if len(found) == len(records):
            break
        sized, bounds = _keys_of_regime(problem, target, batch, lengths, most, few)
        if not sized:
            continue
        points = _points(sized, target)
        base = (
            weight["waves"] * (points[:, 1:2] - waves).abs() + weight["rows"] * (points[:, 2:3] - rows).abs() + farther
        )
        least = torch.tensor(bounds, dtype=torch.float64).log2()
        for index in range(len(records)):
            if index in found:
                continue
            own = keys[index].clamp(min=least.minimum(points[:, 0]), max=points[:, 0])
            nearest = (weight["keys"] * (own[:, None] - keys).abs() + base).argmin(1)
            wins = (nearest == index).nonzero().flatten()
            if len(wins):
                n = int(wins[len(wins) // 2])
                length = min(most, max(1, round(2.0 ** float(own[n]))))
                found[index] = sized[n] if own[n] == points[n, 0] else sized[n].replace(seqlen_k=length)
    exact = (r.problem for _, r in records if _within(r.problem, problem, most))
    return list(dict.fromkeys([*found.values(), *(p.replace(head_dim=problem.head_dim) for p in exact)]))


def _keys_of_regime(
    problem: Problem, target: Target, batch: int, lengths: list[int], most: int, few: bool
) -> tuple[list[Problem], list[int]]:
    """For each number of rows the size of the most keys that has few rows or has not, and the fewest keys of such."""
    sized, bounds = [], []
    for n in lengths:
        size = problem.resized(batch, n, most)
        keys, fewest = most, n if problem.mask == "causal" else 1
        has = size_point.has_few_rows(size, target)
        if has and not size_point.has_few_rows(size.resized(batch, n, fewest), target):  # it depends on the keys
            keys, fewest = (most, max(fewest, size_point.SHARED_KEYS)) if few else (size_point.SHARED_KEYS - 1, fewest)
        elif has != few:
            continue
        if fewest <= keys:
            sized.append(size.resized(batch, n, keys))
            bounds.append(fewest)
    return sized, bounds


def _within(recorded: Problem, problem: Problem, most: int) -> bool:
    """Whether a record's own size is one that may be asked for: then it serves it even where others are as near."""
    alike = ("heads", "kv_heads", "head_dim", "head_dim_v", "window_left", "window_right")
    same = all(getattr(recorded, name) == getattr(problem, name) for name in alike)
    return same and max(recorded.seqlen_q, recorded.seqlen_k) <= most


def _by_default(problem: Problem, target: Target, most: int) -> list[Problem]:
    able, _ = families.serving(problem, target)
    readers = [_reader(family, problem, target) for family in able]
    found: dict[Any, Problem] = {}
    for sized in itertools.chain(*_grid(problem, target, most, able)):
        found.setdefault(tuple(read(sized) for read in readers), sized)
    return list(found.values())


def _by_confirmed(problem: Problem, target: Target, most: int, recorded: dict[bool, list[_Recorded]]) -> list[Problem]:
    """Sizes of the grid at which a default serves in the place of a record that only confirms it; records by whether
    they have few rows."""
    import torch

    able, _ = families.serving(problem, target)
    confirmed = {few: [_confirmed(r, target, able) for _, r in records] for few, records in recorded.items()}
    asked = list({family.name: family for each in confirmed.values() for family in each if family}.values())
    points = {few: _points([r.problem for _, r in records], target) for few, records in recorded.items()}
    farther = {few: _farther(records) for few, records in recorded.items()}
    weights = torch.tensor(list(size_point.WEIGHTS.values()), dtype=torch.float64)
    readers = {f.name: _reader(f, problem, target) for f in asked}
    found: dict[Any, Problem] = {}
    for row in _grid(problem, target, most, asked, between=True) if asked else ():
        new: dict[bool, list[tuple[Problem, dict[str, Any]]]] = {few: [] for few in recorded}
        for sized in row:
            few = size_point.has_few_rows(sized, target)
            if few not in new:
                continue
            reads = {name: (few, name, read(sized)) for name, read in readers.items()}
            if any(key not in found for key in reads.values()):
                new[few].append((sized, reads))
        for few, some in new.items():
            apart = _points([sized for sized, _ in some], target)[:, None] - points[few]
            nearest = ((apart.abs() * weights).sum(2) + farther[few]).argmin(1).tolist() if some else []
            for (sized, reads), index in zip(some, nearest, strict=True):
                family = confirmed[few][index]
                if family is not None:
                    found.setdefault(reads[family.name], sized)
    return list(found.values())


def _reader(family: Family, problem: Problem, target: Target) -> Callable[[Problem], object]:
    """What the family's default looks at of a size of the problem's."""
    reads = family.default_reads
    return reads.of_sizes(problem, target) if isinstance(reads, Reads) else lambda sized: reads(sized, target)


def _confirmed(record: Record, target: Target, able: list[Family]) -> Family | None:
    return next((f for f in able if f.name == record.family and choose.confirms(record, f, target)), None)


def _farther(records: list[_Recorded]) -> torch.Tensor:
    import torch

    return torch.tensor([store.ELSEWHERE * elsewhere for elsewhere, _ in records], dtype=torch.float64)


def _points(sizes: list[Problem], target: Target) -> torch.Tensor:
    import torch

    rows = [list(size_point.features(p, target.units).values()) for p in sizes]
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(size_point.WEIGHTS))


def _grid(
    problem: Problem, target: Target, most: int, able: list[Family], *, between: bool = False
) -> Iterator[list[Problem]]:
    """Sizes at which the families' defaults may differ, those of one batch and number of rows together. Of more
    sequences than one those of the fewest and the most keys, with `between` of some between them, too."""
    doublings = most.bit_length() * _GRID
    lengths = sorted(
        {min(most, max(1, round(2 ** (i / _GRID)) + step)) for i in range(doublings) for step in (-1, 0, 1)}
    )
    rows = lengths if any(f.default_reads is not families.nothing for f in able) else lengths[-1:]
    few = sorted({*lengths[::_COARSE], *_edges(problem, target, most, able)}) if between else []
    for batch, some in _batches(problem, target, rows):
        for n in some:
            keys = lengths if batch == 1 else [n, *(k for k in few if k != n), lengths[-1]]
            longer = [k for k in keys if problem.mask != "causal" or k >= n]
            yield [problem.resized(batch, n, k) for k in longer]
    yield _scattered(problem, most, able, target)


def _scattered(problem: Problem, most: int, able: list[Family], target: Target) -> list[Problem]:
    """Sizes at random, the same each time, of families whose defaults compare tilings: which one wins may depend on
    every row and key."""
    reads = [family.default_reads for family in able]
    if not any(isinstance(t, Cheaper) for r in reads if isinstance(r, Reads) for t in r.tests(problem, target)):
        return []
    draw, found = Random(problem.static_key), []
    for _ in range(_SCATTERED):
        batch, rows, keys = (round(2 ** draw.uniform(0, math.log2(bound))) for bound in (_MOST_BATCH, most, most))
        found.append(problem.resized(batch, rows, max(rows, keys) if problem.mask == "causal" else keys))
    return found


def _edges(problem: Problem, target: Target, most: int, able: list[Family]) -> set[int]:
    """Numbers of keys beside the limits of the families' defaults."""
    reads = [family.default_reads for family in able]
    tests = [test for each in reads if isinstance(each, Reads) for test in each.tests(problem, target)]
    limits = [t.limit for t in tests if isinstance(t, AtMost) and t.measure in ("keys", "seen_keys")]
    return {keys for limit in limits for keys in (limit, limit + 1) if 1 <= keys <= most}


def all_sizes(problems: Iterable[Problem], target: Target, most: int) -> list[Problem]:
    """The same for several problems; those that differ in batch and lengths alone ask for the same."""
    kinds = {p.replace(batch=1, seqlen_q=1, seqlen_k=1): p for p in problems}
    return list(dict.fromkeys(size for p in kinds.values() for size in sizes(p, target, most)))


def with_forward(problems: Iterable[Problem]) -> list[Problem]:
    """The problems, and the calls that those of the backward op differentiate."""
    every = list(problems)
    return list(dict.fromkeys([*every, *(p.forward for p in every if isinstance(p, BackwardProblem))]))


def helpers_of(problems: Iterable[Problem]) -> list[Helper]:
    """The kernels beside those that are searched: new rows of a cache, bounds of packed sequences."""
    every = list(problems)
    decodes, packs = any(p.op == "decode" for p in every), any(getattr(p, "intervals", "") for p in every)
    return [*([append.HELPER] if decodes else []), *([packed.HELPER] if packs else [])]


def warmup(
    problems: Iterable[Problem], target: Target | None = None, *, max_seqlen: int | None = None, gradients: bool = False
) -> int:
    """Compile and load what these problems need, and the binding, ahead of the first call; how many kernels that is.

    With `max_seqlen`: what they need at any batch and any lengths up to it. With `gradients`: what a step of training
    needs, deterministic gradients after `torch.use_deterministic_algorithms(True)`.
    """
    from fagen.target import detect

    target = target or detect()
    problems = with_forward(problems)
    if gradients:
        repeated = derivatives.must_repeat(False)
        problems += [BackwardProblem.of(p, deterministic=repeated) for p in problems if p.op == "forward"]
    asked = problems if max_seqlen is None else all_sizes(problems, target, max_seqlen)
    wanted: dict[Key, KernelSpec] = {}
    for problem in asked:
        choice = choose.choose(problem, target, ours=True)
        if choice.spec is not None:
            wanted[choice.spec.key] = choice.spec

    def attempt(spec: KernelSpec) -> None:
        try:
            kernels.built(spec)
        except FagenError:
            if env.build_mode() == "never":
                raise

    with ThreadPoolExecutor(compile_workers(target.is_gpu)) as pool:
        jobs: list[Future[Any]] = [pool.submit(binding.load), *(pool.submit(attempt, spec) for spec in wanted.values())]
        jobs += [pool.submit(helper.library, target, capturing=False) for helper in helpers_of(problems)]
        for job in jobs:
            job.result()
    for spec in wanted.values():
        kernels.prime(spec)
    resolve.renew()
    for problem in asked:  # says what could not be built, and tells the plans what is
        resolve.answer(problem, target, ours=True)
    return len(wanted)
