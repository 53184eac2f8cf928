"""fagen.DecodePlan: blocks that get about as many keys each, whatever the lengths are."""

from __future__ import annotations

import heapq
from typing import Any

import pytest
import torch

import fagen
from fagen.bench import suites
from fagen.dispatch import decode
from fagen.errors import FagenError
from fagen.families import cpu_decode, sm80_decode
from fagen.ops.attention import decode_reference
from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.target import host, known
from tests.support.append import integers

H100 = known("sm_90")


def loads(p: DecodeProblem, lengths: list[int], size: int, resident: int, planes: int) -> tuple[float, float]:
    """When the device ends, and the mean of its places, in keys: blocks go to free places in the order of the grid."""
    places, total = [0.0] * resident, 0.0
    for length in lengths:
        for first in range(0, length, size):
            for _ in range(planes):
                keys = min(size, length - first)
                heapq.heapreplace(places, places[0] + keys + sm80_decode.START_KEYS)
                total += keys + sm80_decode.START_KEYS
    return max(places), total / resident


def test_blocks_get_about_as_many_keys() -> None:
    """Within 5 % of the mean on the ragged suite, where whole sequences would leave most of the device idle."""
    for row in suites.suite("ragged", H100, op="decode"):
        p, lengths = row.problem, [keys for _, keys in row.steps]
        config = sm80_decode.FAMILY.default(p, H100)
        resident, planes = H100.units * config.blocks_per_sm, p.kv_heads
        size = sm80_decode.split_keys(p, H100, config, lengths)
        assert size % config.tile_n == 0 and -(-p.seqlen_k // size) <= sm80_decode.MOST_SPLITS
        end, mean = loads(p, lengths, size, resident, planes)
        assert end <= 1.05 * mean, (size, end / mean)
        whole, least = loads(p, lengths, p.seqlen_k, resident, planes)
        assert whole > 1.5 * least and end < 0.6 * whole, "a block for the keys of a sequence"


@pytest.mark.parametrize(("lengths", "whole"), [([4096] * 264, True), ([65536], False), ([0] * 8, True), ([100], True)])
def test_keys_are_split_where_that_helps(lengths: list[int], whole: bool) -> None:
    """Not where all places have as much to do anyway, nor where there is next to nothing."""
    p = DecodeProblem(head_dim=128, heads=32, kv_heads=8, batch=len(lengths), seqlen_k=max(128, *lengths), page=16)
    config = sm80_decode.FAMILY.default(p, H100)
    size = sm80_decode.split_keys(p, H100, config, lengths)
    assert (size >= max(lengths)) is whole, size


def test_a_plan_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of a split reach the kernel; other lengths than those of the plan are served as well."""
    p = DecodeProblem(dtype="fp32", head_dim=16, heads=4, kv_heads=2, batch=3, seqlen_k=200)
    q, k, v = torch.randn(3, 1, 4, 16), torch.randn(3, 256, 2, 16), torch.randn(3, 256, 2, 16)
    seen: list[int] = []
    launch = decode.launch

    def launched(prepared: Any, *words: Any) -> Any:
        seen.append(prepared.params.num_splits)
        return launch(prepared, *words)

    monkeypatch.setattr(decode, "launch", launched)
    plan = fagen.DecodePlan(p, [200, 3, 0])
    assert plan.split_keys == 0, "the CPU's kernel divides its work itself"
    given: list[Any] = []
    object.__setattr__(cpu_decode.FAMILY, "split_keys", lambda *words: given.append(words) or 64)
    try:
        split = fagen.DecodePlan(p, [200, 3, 0], host())
    finally:
        object.__setattr__(cpu_decode.FAMILY, "split_keys", lambda *words: 0)
    assert split.split_keys == 64 and given[0][3] == [200, 3, 0]
    for lengths in ([200, 3, 0], [1, 200, 150]):
        call = DecodeCall(q, k, v, integers(lengths), most_keys=200)
        for each in (plan, split):
            made = each.run(q, k, v, cache_seqlens=integers(lengths), return_softmax_lse=True)
            assert isinstance(made, tuple)
            verdict = decode_reference.check(call, dict(zip(("out", "lse"), made, strict=True)))
            assert verdict, verdict.message
    assert seen == [0, -64, 0, -64]


def test_what_a_plan_refuses() -> None:
    p = DecodeProblem(dtype="fp32", head_dim=16, heads=4, kv_heads=2, batch=2, seqlen_k=64)
    for problem, lengths in ((p, [1]), (p, [1, 65]), (p, [-1, 3]), (p, [1.5, 2]), ("decode", [1, 2])):
        with pytest.raises(FagenError):
            fagen.DecodePlan(problem, lengths)  # type: ignore[arg-type]
    plan, q, k = fagen.DecodePlan(p, [1, 2]), torch.zeros(2, 1, 4, 16), torch.zeros(2, 64, 2, 16)
    for named in ({"num_splits": 2}, {"numerics": "pinned"}, {"max_seqlen_k": 3}):
        with pytest.raises(FagenError, match="plan's to give"):
            plan.run(q, k, k, **named)
