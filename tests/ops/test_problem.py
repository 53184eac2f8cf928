"""Problem and target: what is static, what is size, what is refused."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fagen import schema, target
from fagen.errors import InvalidArgument, UsageError
from fagen.ops.attention.inputs import make_inputs
from fagen.ops.attention.masks import dense
from fagen.ops.attention.problem import INTERVAL_KINDS, MASKS, Problem, padded

SIZES = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k")


def test_defaults_are_filled_in() -> None:
    p = Problem(head_dim=64, heads=8, seqlen_q=100)
    assert (p.head_dim_v, p.kv_heads, p.seqlen_k) == (64, 8, 100)
    assert Problem(mask="causal", window_left=5).window_left == -1 and Problem(mask="causal").window_right == 0


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"head_dim": 100, "head_dim_v": 20}, "forward/bf16/d112-32/none"),
        ({"mask": "causal", "softcap": True, "alibi": True}, "forward/bf16/d128/causal/softcap/alibi"),
        ({"mask": "intervals", "intervals": "both2", "aligned": False}, "forward/bf16/d128/intervals-both2/unaligned"),
        ({"dtype": "fp32", "mask": "window", "window_left": 9}, "forward/fp32/d128/window"),
        ({"dtype": "fp32", "dropout": True, "tf32": True}, "forward/fp32/d128/none/dropout/tf32"),
    ],
)
def test_static_keys(fields: dict, key: str) -> None:
    assert Problem(**fields).static_key == key


@given(st.fixed_dictionaries({name: st.integers(1, 64) for name in ("batch", "kv_heads", "seqlen_q", "seqlen_k")}))
def test_sizes_never_reach_the_static_key(sizes: dict) -> None:
    p = Problem(**sizes, heads=sizes["kv_heads"] * 2, mask="window", window_left=sizes["seqlen_q"])
    assert p.static_key == Problem(mask="window").static_key
    assert p.size_key != p.replace(seqlen_q=p.seqlen_q + 1).size_key


def test_every_static_field_reaches_the_static_key() -> None:
    base = Problem(mask="intervals", intervals="both2")
    changes = {
        "dtype": "fp16", "head_dim": 64, "head_dim_v": 64, "intervals": "both4", "softcap": True, "alibi": True,
        "aligned": False,
    }  # fmt: skip
    keys = {base.replace(**{name: value}).static_key for name, value in changes.items()}
    assert len(keys | {base.static_key}) == len(changes) + 1


@given(st.integers(1, 256), st.integers(1, 256))
def test_one_kernel_for_all_sizes_of_a_pad(a: int, b: int) -> None:
    same = padded(a) == padded(b)
    assert (Problem(head_dim=a, head_dim_v=16).static_key == Problem(head_dim=b, head_dim_v=16).static_key) == same


def test_survives_json() -> None:
    p = Problem(dtype="fp32", head_dim=48, mask="window", window_left=3, window_right=4, heads=4, kv_heads=2)
    assert Problem.from_dict(p.to_dict()) == p
    with pytest.raises(InvalidArgument, match="unknown problem field 'colour'"):
        Problem.from_dict({"colour": 1})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"op": "backward"}, "op 'backward' is unknown"),
        ({"dtype": "fp64"}, "dtype 'fp64' is not supported"),
        ({"mask": "bias"}, "mask 'bias' is unknown"),
        ({"mask": "intervals"}, "does not go with mask='intervals'"),
        ({"intervals": "both2"}, "does not go with mask='none'"),
        ({"head_dim": 1025}, "head_dim=1025 is out of range"),
        ({"head_dim": -1}, "head_dim=-1 is out of range"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"heads": 6, "kv_heads": 4}, "must divide number of heads in query"),
        ({"mask": "window", "window_left": -2}, "window bounds are -1"),
    ],
)
def test_refusals(fields: dict, words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Problem(**fields)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(-1, 12), st.integers(-1, 12))
def test_visible_counts_the_cells_of_the_mask(sq: int, sk: int, left: int, right: int) -> None:
    p = Problem(mask="window", seqlen_q=sq, seqlen_k=sk, window_left=left, window_right=right)
    assert p.visible() == int(dense(sq, sk, window=(left, right)).sum())


def visible_row_by_row(p: Problem) -> int:
    total, shift = 0, p.seqlen_k - p.seqlen_q
    for row in range(p.seqlen_q):
        first = max(0, row + shift - p.window_left) if p.window_left >= 0 else 0
        last = min(p.seqlen_k, row + shift + p.window_right + 1) if p.window_right >= 0 else p.seqlen_k
        total += max(0, last - first)
    return total


def test_visible_counts_as_a_loop_over_the_rows_does() -> None:
    some = random.Random(0)
    bound = lambda: some.choice((-1, 0, some.randrange(8), some.randrange(200), schema.MOST))  # noqa: E731
    for _ in range(3000):
        mask = some.choice(("none", "causal", "window"))
        rows, cols = some.randrange(1, 90), some.randrange(1, 90)
        p = Problem(mask=mask, seqlen_q=rows, seqlen_k=cols, window_left=bound(), window_right=bound())
        assert p.visible() == visible_row_by_row(p), p


def test_the_longest_sequence_costs_no_time() -> None:
    n = schema.MOST
    assert Problem(mask="causal", seqlen_q=n).visible() == float(n * (n + 1) // 2)
    assert Problem(mask="window", window_left=9, window_right=0, seqlen_q=n).visible() == float(10 * n - 45)
    assert Problem(batch=n, heads=n, seqlen_q=n).flops() < math.inf


@pytest.mark.parametrize("fields", [{}, {"dtype": "fp32", "alibi": True}, {"mask": "intervals", "intervals": "both4"}])
def test_bytes_are_those_of_the_tensors(fields: dict) -> None:
    p = Problem(batch=2, heads=4, kv_heads=2, head_dim=48, head_dim_v=32, seqlen_q=9, seqlen_k=17, **fields)
    inputs = make_inputs(p, "cpu")
    tensors = inputs.call.inputs() | inputs.outputs
    if p.intervals:
        tensors["intervals"] = tensors["intervals"].expand(-1, p.kv_heads, -1, -1)  # at most: each head has its own
    assert p.bytes() == sum(t.numel() * t.element_size() for t in tensors.values())


def test_vocabulary_is_closed() -> None:
    for mask, kind in itertools.product(MASKS, ("", *INTERVAL_KINDS)):
        if (mask == "intervals") == bool(kind):
            assert Problem(mask=mask, intervals=kind).mask == mask


# ---- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", target.ARCHS)
def test_every_arch_is_known_without_its_device(arch: str) -> None:
    t = target.known(arch)
    assert t.arch == arch and t.units > 0 and t.is_gpu == (arch != "cpu")
    assert not t.is_gpu or (t.capability >= 80 and t.smem_per_block > 90_000)


def test_an_unknown_arch_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown arch 'sm_99'"):
        target.known("sm_99")


def test_this_machine() -> None:
    t = target.host()
    assert t is target.host() and t.simd in ("avx512", "avx2", "neon", "generic") and t.device
