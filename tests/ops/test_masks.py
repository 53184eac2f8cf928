"""The makers of intervals against masks written out cell by cell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fagen.errors import InvalidArgument
from fagen.ops.attention import masks
from fagen.ops.attention.problem import INTERVAL_KINDS

lengths = st.integers(1, 24)


def cells(sq: int, sk: int, sees) -> torch.Tensor:  # noqa: ANN001
    return torch.tensor([[bool(sees(row, col)) for col in range(sk)] for row in range(sq)]).reshape(sq, sk)


def seen_by(intervals: torch.Tensor, sq: int, causal: bool) -> torch.Tensor:
    kind = masks.interval_kind(intervals.shape[3], causal)
    return masks.dense(sq, intervals.shape[2], window=(-1, 0 if causal else -1), intervals=intervals, kind=kind)


@given(lengths, lengths, st.integers(-1, 8), st.integers(-1, 8))
def test_dense_window(sq: int, sk: int, left: int, right: int) -> None:
    def sees(row: int, col: int) -> bool:
        distance = col - (row + sk - sq)
        return (left < 0 or distance >= -left) and (right < 0 or distance <= right)

    assert torch.equal(masks.dense(sq, sk, window=(left, right))[0, 0], cells(sq, sk, sees))


@given(lengths, lengths)
def test_dense_rows_are_rows_of_the_whole(sq: int, sk: int) -> None:
    whole = masks.dense(sq, sk, window=(3, 1))
    part = masks.dense(sq, sk, window=(3, 1), rows=slice(sq // 3, sq // 3 + 5))
    assert torch.equal(part, whole[:, :, sq // 3 : sq // 3 + 5])


@settings(max_examples=50)
@given(st.sampled_from(sorted(INTERVAL_KINDS)), lengths, lengths, st.booleans(), st.integers(0, 2**32 - 1))
def test_dense_intervals_mean_what_the_docs_say(kind: str, sq: int, sk: int, causal: bool, seed: int) -> None:
    bounds = INTERVAL_KINDS[kind]
    values = torch.randint(0, sq + 1, (2, 1, sk, len(bounds)), generator=torch.Generator().manual_seed(seed))
    got = masks.dense(sq, sk, window=(-1, 0 if causal else -1), intervals=values.int(), kind=kind)
    for b in range(2):

        def sees(row: int, col: int, b: int = b) -> bool:
            at = dict(zip(bounds, values[b, 0, col].tolist(), strict=True))
            lower = at["LTS"] <= row < at.get("LTE", sq)
            upper = "UTE" in at and at.get("UTS", 0) <= row < at["UTE"]
            return not lower and not upper and (not causal or col <= row + sk - sq)

        assert torch.equal(got[b, 0], cells(sq, sk, sees))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.booleans())
def test_documents(sizes: list[int], causal: bool) -> None:
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    both = torch.stack([ids, torch.zeros_like(ids)])
    intervals = masks.from_documents(both, causal=causal)
    n = len(ids)
    assert intervals.dtype == torch.int32 and intervals.shape == (2, 1, n, 1 if causal else 2)
    got = seen_by(intervals, n, causal)
    assert torch.equal(got[0, 0], cells(n, n, lambda i, j: ids[i] == ids[j] and (not causal or j <= i)))
    assert torch.equal(got[1, 0], cells(n, n, lambda i, j: not causal or j <= i))


@given(lengths, lengths, st.integers(0, 30), st.integers(0, 30))
def test_prefix(sq: int, sk: int, first: int, second: int) -> None:
    intervals = masks.from_prefix([first, second], sq, sk)
    got = seen_by(intervals, sq, causal=False)
    for b, prefix in enumerate((first, second)):
        assert torch.equal(got[b, 0], cells(sq, sk, lambda i, j, p=prefix: j < p or j <= i + sk - sq))


@given(lengths, lengths, st.none() | st.integers(0, 8), st.none() | st.integers(0, 8))
def test_window_as_intervals_is_the_window(sq: int, sk: int, left: int | None, right: int | None) -> None:
    intervals = masks.from_window(left, right, 2, sq, sk)
    want = masks.dense(sq, sk, window=(-1 if left is None else left, -1 if right is None else right))
    assert torch.equal(seen_by(intervals, sq, causal=False), want.expand(2, 1, sq, sk))


def test_refusals() -> None:
    with pytest.raises(InvalidArgument, match="3 columns"):
        masks.interval_kind(3, True)
    with pytest.raises(InvalidArgument, match="1 dimensions"):
        masks.from_documents(torch.zeros(5, dtype=torch.long))
