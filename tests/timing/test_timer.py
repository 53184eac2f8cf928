"""The clock's arithmetic, and inputs for every mask and feature."""

from __future__ import annotations

import time
from random import Random

import pytest
import torch

from fagen.ops.attention import masks
from fagen.ops.attention.inputs import make_inputs
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.ops.inputs import input_sets
from fagen.target import Target
from fagen.timing import timer
from fagen.timing.timer import Timing, beats, time_calls

SMALL = {"dtype": "fp32", "head_dim": 16, "batch": 2, "heads": 4, "kv_heads": 2, "seqlen_q": 70, "seqlen_k": 100}


def test_median_and_half_the_interquartile_range():
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median, timing.spread, timing.samples) == (3.0, 1.0, 5)
    assert Timing.of([2.0]) == Timing(2.0, 0.0, 1)


def test_faster_means_by_more_than_the_noise():
    quiet, loud = 1e-3, 0.3
    assert beats(Timing(1.0, quiet, 30), Timing(1.1, quiet, 30))
    assert not beats(Timing(1.0, loud, 30), Timing(1.1, loud, 30))
    assert not beats(Timing(1.0, 0.0, 30), Timing(1.004, 0.0, 30))  # below what counts, however quiet
    assert not beats(Timing(1.1, quiet, 30), Timing(1.0, quiet, 30))
    assert not beats(Timing(1.0, 0.0, 30), Timing(1.0, 0.0, 30))


def test_what_slows_all_of_a_round_is_nobodys_noise():
    draw = Random(7)
    clock = [draw.uniform(0.8, 1.2) for _ in range(30)]
    times = {"a": 1.0, "b": 1.03, "c": 2.0, "d": 5.0}
    seconds = {name: [time * level * draw.uniform(0.99, 1.01) for level in clock] for name, time in times.items()}
    apart = {name: Timing.of(values) for name, values in seconds.items()}
    assert not beats(apart["a"], apart["b"])
    together = timer.against_each_other(seconds)
    assert beats(together["a"], together["b"])
    ratio = together["b"].median / together["a"].median
    assert ratio == pytest.approx(1.03, abs=0.01)
    for name, timing in together.items():  # its own noise stays, half of an interquartile range of a hundredth
        assert timing.spread / timing.median == pytest.approx(0.005, rel=0.6)
        assert timing.median == pytest.approx(apart[name].median, rel=0.05)


def test_one_call_alone_keeps_all_of_its_noise():
    assert timer.against_each_other({"a": [1.0, 2.0, 3.0]}) == {"a": Timing.of([1.0, 2.0, 3.0])}
    two = timer.against_each_other({"a": [1.0, 1.0, 1.1, 1.1], "b": [1.0, 1.0, 1.0, 1.0]})
    assert two["a"].spread > 0.02


@pytest.mark.parametrize("mask", ["none", "causal", "window"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_inputs_have_the_problems_shapes(mask, dtype):
    problem = Problem(**{**SMALL, "dtype": dtype}, mask=mask, window_left=7 if mask == "window" else -1, head_dim_v=24)
    inputs = make_inputs(problem, "cpu")
    assert inputs.call.q.shape == (2, 70, 4, 16)
    assert inputs.call.k.shape == (2, 100, 2, 16)
    assert inputs.call.v.shape == (2, 100, 2, 24)
    assert inputs.outputs["out"].shape == (2, 70, 4, 24)
    assert inputs.outputs["out"].isnan().all()
    assert inputs.outputs["lse"].isnan().all()
    assert inputs.call.window == (problem.window_left, problem.window_right)
    assert torch.equal(inputs.call.q, make_inputs(problem, "cpu").call.q)
    assert not torch.equal(inputs.call.q, make_inputs(problem, "cpu", seed=1).call.q)


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("kind", INTERVAL_KINDS)
def test_intervals_are_documents(kind, varied):
    causal = kind.startswith("lower")
    problem = Problem(**SMALL, mask="intervals", intervals=kind, window_right=0 if causal else -1)
    inputs = make_inputs(problem, "cpu", varied=varied)
    vectors = inputs.call.intervals
    assert vectors.dtype == torch.int32
    assert vectors.shape == (2, 2 if varied else 1, 100, len(INTERVAL_KINDS[kind]))
    assert vectors.min() >= 0
    assert vectors.max() <= 70
    seen = masks.dense(70, 100, window=inputs.call.window, intervals=vectors, kind=kind)
    assert 0.05 < seen.float().mean() < 0.95
    if not varied:  # a block diagonal: each row sees its own key's document
        rows = torch.arange(70)
        assert seen[:, :, rows, rows + 30].all()


def test_documents_of_a_causal_and_a_full_kind_agree_below_the_diagonal():
    full = Problem(**SMALL, mask="intervals", intervals="both2")
    lower = full.replace(intervals="lower1", window_right=0)
    a, b = (
        masks.dense(70, 100, window=(-1, 0), intervals=make_inputs(p, "cpu").call.intervals, kind=p.intervals)
        for p in (full, lower)
    )
    assert torch.equal(a, b)


def test_features_and_alignment():
    problem = Problem(**SMALL, softcap=True, alibi=True, aligned=False)
    inputs = make_inputs(problem, "cpu")
    assert inputs.call.softcap > 0
    assert inputs.call.alibi_slopes.shape == (2, 4)
    assert inputs.call.q.stride(2) % 4 != 0
    assert inputs.call.q.stride(3) == 1


def test_small_inputs_are_taken_in_turn_on_a_gpu():
    gpu = Target("sm_90", "NVIDIA H200", 132, l2=60 << 20)
    small, large = Problem(seqlen_q=256), Problem(batch=4, heads=32, seqlen_q=16384)
    assert input_sets(small, gpu) > 1
    assert input_sets(large, gpu) == 1
    assert input_sets(small, Target("cpu", "x", 2)) == 1
    calls = []
    turn = timer.RoundRobin([lambda: calls.append("a"), lambda: calls.append("b")])
    for _ in range(3):
        turn()
    assert calls == ["a", "b", "a"]


def test_rounds_are_interleaved_and_turned():
    calls: list[str] = []

    def call(name):
        def it():
            calls.append(name)
            time.sleep(1e-3)  # long enough to be one call a sample

        return it

    timings = time_calls({name: call(name) for name in "abc"}, device="cpu", rounds=3)
    rounds = "".join(calls[6:])  # after two calls each to warm up and calibrate
    assert rounds == "abc" + "bca" + "cab"
    assert all(t.samples == 3 and t.median >= 1e-3 for t in timings.values())


def test_time_limits(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        def work(self) -> None:
            self.now += 5e-3

    clock = Clock()
    monkeypatch.setattr(timer, "time", clock)
    slow = {"it": clock.work}
    assert time_calls(slow, device="cpu", rounds=100, max_seconds=0.05)["it"].samples in (10, 11)
    assert time_calls(slow, device="cpu", rounds=1, min_seconds=0.05)["it"].samples in (10, 11)
    assert time_calls(slow, device="cpu", rounds=4)["it"].samples == 4


# ---- what a kernel must leave alone ---------------------------------------------------------------------------------


def _beyond(inputs, name, offset):
    """The element at some distance from the output's first one."""
    t = inputs.outputs[name]
    return t._base[t.storage_offset() + offset : t.storage_offset() + offset + 1]


@pytest.mark.parametrize("name", ["out", "lse"])
@pytest.mark.parametrize("aligned", [True, False])
def test_writes_beside_an_output_are_seen(name, aligned):
    problem = Problem(**SMALL, aligned=aligned)
    room = {"out": 2 * 70 * 4 * (16 if aligned else 17), "lse": 2 * 4 * 70}[name]
    for offset in (-1, -200, room, room + 200, *([16] if name == "out" and not aligned else [])):
        inputs = make_inputs(problem, "cpu")
        inputs.outputs["out"].zero_()
        inputs.outputs["lse"].zero_()
        assert inputs.damage() == ""
        _beyond(inputs, name, offset).zero_()
        assert inputs.damage() == f"wrote outside of {name}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_writes_into_an_input_are_seen(dtype):
    inputs = make_inputs(Problem(**{**SMALL, "dtype": dtype, "seqlen_k": 101, "kv_heads": 1, "heads": 1}), "cpu")
    inputs.call.v[1, 100, 0, 15] += 1
    inputs.call.q[0, 0, 0, 0] = float("nan")
    assert inputs.damage() == "wrote into its input q and wrote into its input v"


def test_outputs_are_as_aligned_as_kernels_want():
    from fagen.ops.attention.arguments import is_aligned

    for dtype in ("fp32", "bf16"):
        assert is_aligned(make_inputs(Problem(**{**SMALL, "dtype": dtype}), "cpu").outputs["out"])


SAMPLED = [
    {},
    {"mask": "causal"},
    {"mask": "window", "window_left": 9, "window_right": 3},
    {"mask": "intervals", "intervals": "both2"},
    {"alibi": True, "softcap": True},
]


@pytest.mark.parametrize("mask", SAMPLED)
def test_a_sample_of_rows_is_checked(mask):
    from fagen.ops.attention import reference
    from fagen.ops.attention.forward_calls import check_sample

    inputs = make_inputs(Problem(**{**SMALL, "seqlen_q": 200, "seqlen_k": 150}, **mask), "cpu", varied=True)
    call = inputs.call
    right = reference.attend(call, call.bhsd(), reference.visible(call))[0].transpose(1, 2)
    inputs.outputs["out"].copy_(right)
    assert check_sample(inputs.call, {"out": inputs.outputs["out"]})
    for plane in ((0, 0, 0), (1, 199, 3)):  # the first and the last are always among them
        inputs.outputs["out"].copy_(right)
        inputs.outputs["out"][plane] += 0.01
        verdict = check_sample(inputs.call, {"out": inputs.outputs["out"]})
        assert not verdict
        assert f"sample of batch {plane[0]} head {plane[2]}: O: error 0.01" in verdict.message


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_a_loud_timing_is_taken_again_and_the_quietest_stays():
    def playing(*timings):
        return iter([Timing(median, spread, 15) for median, spread in timings]).__next__

    assert timer.quietest(playing((1.0, 0.01))) == (Timing(1.0, 0.01, 15), 0)
    assert timer.quietest(playing((1.0, 0.3), (1.2, 0.02), (9.0, 0.0))) == (Timing(1.2, 0.02, 15), 1)
    assert timer.quietest(playing((1.0, 0.3), (1.2, 0.2), (1.1, 0.1), (1.3, 0.4), (9.0, 0.0))) == (
        Timing(1.1, 0.1, 15),
        3,
    )
    assert timer.quietest(playing((1.0, 0.3), (9.0, 0.0)), seconds=0.0)[1] == 0


@pytest.mark.parametrize("aligned", [True, False])
def test_guards_hold_in_inference_mode_too(aligned):
    """Where views do not know their base, as inside of an op."""
    with torch.inference_mode():
        inputs = make_inputs(Problem(**SMALL, aligned=aligned), "cpu")
        assert inputs.outputs["out"]._base is None and inputs.damage() == ""
        behind = inputs.outputs["out"].as_strided((1,), (1,), inputs.outputs["out"].storage_offset() - 1)
        behind.zero_()
        assert inputs.damage() == "wrote outside of out"
