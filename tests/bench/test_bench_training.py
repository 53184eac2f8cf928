"""fagen bench for training: steps through autograd, what dropout and equal bits cost, packed sequences, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
from unittest import mock

import pytest
import torch

from fagen import target
from fagen.bench import (
    attention,
    autograd,
    by_op,
    flash,
    flash_training,
    flex,
    memory,
    peers,
    report,
    rows,
    run,
    sdpa,
    suites,
)
from fagen.bench.peers import OURS, PLAIN, Cannot
from fagen.build import toolchain
from fagen.cli import main
from fagen.errors import UsageError
from fagen.ops.attention import fallback
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.timing import timer
from tests.bench.test_bench_backward import NEW, FakeOp, schema

pytestmark = pytest.mark.usefixtures("quick_machine")

GPU = target.known("sm_90")
needs_cxx = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
SHAPE = {"dtype": "fp32", "heads": 4, "kv_heads": 2, "head_dim": 16}
LENGTHS = (5, 17, 1, 9)


def step_row(**fields) -> rows.Row:
    problem = BackwardProblem(**{**SHAPE, "seqlen_q": 20, **fields})
    return rows.row_of_op(rows.of_problem(problem), rows.TRAINING)


def packed_row(op: str, **fields) -> rows.Row:
    row = suites.documents_row("packed", LENGTHS, causal=True, **{**SHAPE, **fields})
    return rows.row_of_op(dataclasses.replace(row, packed=True), op)


def by_torch(row, inputs):
    return lambda i: fallback.attend(i.call)[0]


def right(serve, inputs) -> bool:
    return bool(run.verified(serve(inputs), inputs.call, 1 << 30)[0])


# ---- suites ---------------------------------------------------------------------------------------------------------


def test_the_suites_of_training():
    for name, count, op in (
        ("training", 14, "training"),
        ("deterministic", 10, "backward"),
        ("dropout", 7, "training"),
        ("documents", 9, "backward"),
        ("varlen", 12, "forward"),
        ("ampere", 18, "backward"),
    ):
        found = suites.suite(name, GPU, op=op)
        assert len({row.name for row in found}) == len(found) == count, name
        assert {row.measured for row in found} == {op}
        assert {row.training for row in found} == {op == "training"}
        assert all(rows.deterministic(row.problem) for row in found) is (name == "deterministic")
        assert all(row.problem.dropout for row in found) is (name == "dropout")
    with pytest.raises(UsageError, match="no rows of forward"):
        suites.suite("deterministic", GPU)
    assert suites.default(GPU, "training") == "training"
    assert suites.default(target.host(), "training") == "small"


def test_packed_sequences_are_16k_tokens_that_begin_anywhere():
    for row in suites.suite("varlen", GPU, op="training"):
        assert row.packed and sum(row.documents) == suites.TOKENS == row.problem.seqlen_q
        assert len(row.documents) == int(row.name.removeprefix("varlen").split()[0])
        assert min(row.documents) > 0
        assert len(row.documents) == 1 or any(n % 64 for n in row.documents[:-1])


def test_a_step_is_forward_and_backward():
    row = step_row(mask="causal")
    inputs = rows.make_inputs(row, "cpu")
    assert rows.flops(row, inputs.call) == row.problem.flops() + row.problem.forward.flops()
    one_way = [rows.row_of_op(row, "backward"), rows.of_problem(row.problem.forward)]
    assert rows.least_bytes(row) == sum(map(rows.least_bytes, one_way))


def test_the_inputs_of_a_step_have_no_dropout_of_their_own():
    inputs = rows.make_inputs(step_row(dropout=True), "cpu")
    assert inputs.call.rng is None and not inputs.call.dropout
    assert right(sdpa.math({}).by_op["training"](step_row(), inputs), inputs)


def test_plain_is_without_what_a_row_asks_for():
    row = step_row(deterministic=True, dropout=True)
    assert rows.plain(row).problem == row.problem.replace(deterministic=False, dropout=False)
    forward = rows.of_problem(row.problem.forward)
    assert rows.plain(forward).problem == forward.problem.replace(dropout=False)


# ---- participants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [step_row(mask="causal"), step_row(batch=2), packed_row("training")])
def test_a_step_runs_forward_at_every_call(row):
    ran = []

    def forward(row, inputs):
        return lambda i: (ran.append(i), fallback.attend(i.call)[0])[1]

    inputs = rows.make_inputs(row, "cpu")
    serve = autograd.steps(forward)(row, inputs)
    assert right(serve, inputs) and right(serve, inputs)
    assert len(ran) == 2
    assert ran[0] is ran[1], "its leaves are made once"
    assert all(t.grad is None for t in (ran[0].call.q, ran[0].call.k, ran[0].call.v))


def test_steps_are_held_to_the_same_bits():
    seen = []

    def forward(row, inputs):
        def attend(i):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return fallback.attend(i.call)[0]

        return attend

    for row in (step_row(), step_row(deterministic=True)):
        inputs = rows.make_inputs(row, "cpu")
        autograd.steps(forward)(row, inputs)(inputs)
    assert seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_a_participant_is_held_to_is_set_once_a_sample():
    """A backend of SDPA takes some 20 us to choose, which its users do once."""
    entered: list[int] = []

    @contextlib.contextmanager
    def hold():
        entered.append(0)
        yield

    def forward(row, inputs):
        return peers.Held(lambda i: (entered.append(1), fallback.attend(i.call)[0])[1], (hold,))

    row = step_row(deterministic=True)
    sets = [rows.make_inputs(row, "cpu", seed) for seed in range(2)]
    facts, call = run._participant(autograd.steps(forward), row, sets, "cpu", "held")
    assert facts["outcome"] == "ok" and call is not None and call.count == 2
    del entered[:]
    sampler = timer.sampler_of(call, "cpu")
    sampler.calls = 5
    sampler.sample()
    assert entered == [0, 1, 1, 1, 1, 1]
    assert not torch.are_deterministic_algorithms_enabled()
    sdpa_step = sdpa.math({}).by_op["training"](row, sets[0])
    assert isinstance(sdpa_step, peers.Held) and len(sdpa_step.holds) == 2


FWD = schema(
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, int? max_seqlen_q=None,"
    " int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,"
    " int window_size_right=-1, float softcap=0.0, int num_splits=0"
)


class FakeForward:
    """FlashAttention 3's forward op: output and LSE, then two more. Packed sequences one by one."""

    _schema = FWD

    def __call__(self, *, q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, is_causal=False, num_splits=0, **rest):
        assert num_splits == 1 and cu_seqlens_k is cu_seqlens_q
        from fagen.ops.attention.call import AttentionCall

        ends = [0, q.shape[1]] if cu_seqlens_q is None else cu_seqlens_q.tolist()
        parts = []
        for a, b in zip(ends, ends[1:], strict=False):
            tensors = (t if cu_seqlens_q is None else t[None, a:b] for t in (q, k, v))
            parts.append(fallback.attend(AttentionCall.of(*tensors, causal=is_causal, return_lse=True)))
        out, lse = torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts], 2)
        return (out, lse, None, None) if cu_seqlens_q is None else (out[0], lse[0], None, None)


@pytest.mark.parametrize("row", [step_row(mask="causal"), step_row(batch=2), packed_row("training")])
def test_flash_attention_3_is_trained_through_its_ops(row):
    row = dataclasses.replace(row, problem=row.problem.replace(dtype="bf16"))
    backward, inputs = FakeOp(NEW), rows.make_inputs(row, "cpu")
    if row.documents:
        backward = mock.MagicMock(side_effect=backward, _schema=NEW)
        with mock.patch("tests.bench.test_bench_backward.DOCUMENTS", LENGTHS):
            prepare = flash_training.through_ops(FakeForward(), backward)
            assert right(autograd.steps(prepare)(row, inputs), inputs)
        return
    assert right(autograd.steps(flash_training.through_ops(FakeForward(), backward))(row, inputs), inputs)
    assert backward.given["deterministic"] is False


def test_flash_attention_3_without_a_backward_is_not_trained(monkeypatch):
    forward = types.SimpleNamespace(default=FakeForward())
    monkeypatch.setattr(torch.ops, "flash_attn_3", types.SimpleNamespace(fwd=forward))
    assert flash._fa3("").by_op["training"] == "it registers no op flash_attn_3::bwd"
    torch.ops.flash_attn_3.bwd = types.SimpleNamespace(default=FakeOp(NEW))
    row = dataclasses.replace(step_row(), problem=step_row().problem.replace(dtype="bf16"))
    inputs = rows.make_inputs(row, "cpu")
    assert right(flash._fa3("").by_op["training"](row, inputs), inputs)


def test_who_has_no_dropout_says_so():
    row = dataclasses.replace(step_row(), problem=step_row(dropout=True).problem.replace(dtype="bf16"))
    inputs = rows.make_inputs(row, "cpu")
    for prepare in (flash_training.through_ops(FakeForward(), FakeOp(NEW)), flex._prepare(compiled=False)):
        with pytest.raises(Cannot, match="dropout"):
            prepare(row, inputs)


def test_dropout_is_timed_and_verified_without():
    row, given = step_row(dropout=True), []
    inputs, attend = rows.make_inputs(row, "cpu"), torch.nn.functional.scaled_dot_product_attention

    def spy(*words, **more):
        given.append(more["dropout_p"])
        return attend(*words, **more)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", spy):
        facts, serve = run.prepared(sdpa.math({}).by_op["training"], row, inputs, "cpu", "math")
        assert (facts["outcome"], facts["verified"]) == ("ok", "all, without dropout")
        assert given == [0.0, 0.1]
        serve(inputs)
    assert given[2:] == [0.1]
    assert not right(serve, inputs), "it drops weights"


def test_a_step_that_is_wrong_is_not_timed():
    def wrong(row, inputs):
        serve = sdpa.math({}).by_op["training"](row, inputs)
        return lambda i: tuple(t * 1.01 for t in serve(i))

    row = step_row()
    facts, serve = run.prepared(wrong, row, rows.make_inputs(row, "cpu"), "cpu", "wrong")
    assert (facts["outcome"], serve) == ("wrong", None)


@needs_cxx
@pytest.mark.parametrize("op", ["forward", "training"])
def test_ours_is_called_with_packed_sequences(op, monkeypatch):
    from fagen.compat import varlen

    seen, function = [], varlen.flash_attn_varlen_func
    monkeypatch.setattr(
        varlen, "flash_attn_varlen_func", lambda *a, **more: (seen.append(more), function(*a, **more))[1]
    )
    row = packed_row(op)
    inputs = rows.make_inputs(row, "cpu")
    assert right(by_op.get(op).ours(row, inputs), inputs)
    assert seen[0]["cu_seqlens_q"].tolist() == [0, 5, 22, 23, 32] and seen[0]["causal"] is True
    assert seen[0]["cu_seqlens_q"] is seen[0]["cu_seqlens_k"]


# ---- the clock ------------------------------------------------------------------------------------------------------


def test_steps_are_not_captured(monkeypatch):
    class Sampler(timer._GpuSampler):
        def __init__(self, call):
            self.call, self.calls, self.graph = call, 1, None

        def sample(self):
            return 1e-3

        def capture(self):
            self.graph = object()

    monkeypatch.setattr(timer, "_GpuSampler", Sampler)
    for captured in (True, False):
        found = timer.prepared({"a": int}, "cuda", captured=captured)
        assert (found["a"].graph is not None) is captured
    assert [name for name, how in by_op.OPS.items() if not how.captured] == [rows.TRAINING]


def test_peak_memory_is_that_of_one_call(monkeypatch):
    assert memory.peak(lambda i: None, None, "cpu") is None
    calls = []
    answers = {"memory_allocated": 100, "max_memory_allocated": 160}
    for name in ("synchronize", "reset_peak_memory_stats", *answers):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: (calls.append(name), answers.get(name))[1])
    assert memory.peak(lambda i: calls.append("serve"), None, "cuda") == 60
    reset, before, served, after = (
        calls.index(name) for name in ("reset_peak_memory_stats", "memory_allocated", "serve", "max_memory_allocated")
    )
    assert reset < before < served < after


def test_memory_and_what_something_costs_are_reported():
    facts = {"outcome": "ok", "tflops": 5.0, "gbps": 1.0, "seconds": 1.0, "spread": 0.0}
    participants = {
        OURS: facts | {"tflops": 9.0, "peak_bytes": 3_000_000}, PLAIN: facts | {"tflops": 10.0},
        "fa3": facts | {"peak_bytes": 4_000_000},
    }  # fmt: skip
    row = {
        "name": "a", "length": 16, "bound": "compute", "participants": participants, "choice": {},
        **run.compared(participants),
    }  # fmt: skip
    assert (row["best_peer"], row["ratio"], row["of_plain"]) == ("fa3", 1.8, 0.9), "plain is no peer"
    result = {
        "arch": "sm_90", "rows": [row], "summary": run.summary([row]), "limit": {"samples": []},
        "peers": {PLAIN: {"absent": ""}, "fa3": {"absent": ""}},
    }  # fmt: skip
    head, line = report.lines(result, "compute")
    assert head == ("TFLOP/s", OURS, PLAIN, "fa3", "ratio", "of plain", "of limit")
    assert line == ("a", "9.00", "10.0", "5.00", "1.800x", "0.900x", "–")
    closing = report.closing(result)
    assert "peak memory of a step, MB: a: fagen 3, fa3 4" in closing
    assert any(text.startswith("ours / ours plain: geometric mean 0.900x over 1 rows") for text in closing)


# ---- whole runs -----------------------------------------------------------------------------------------------------

TINY = "--target cpu --dtype fp32 --head-dim 16 --mask causal --seqlen 24 --heads 4 --kv-heads 2".split()
QUICK = "--rounds 3 --min-time 0.01".split()


@needs_cxx
def test_a_run_of_steps(tmp_path, capsys):
    out, markdown = tmp_path / "x.json", tmp_path / "x.md"
    words = ["bench", "--op", "training", *TINY, *QUICK, "--peers", "sdpa,plain", "--out", str(out)]
    assert main.main([*words, "--deterministic", "--markdown", str(markdown)]) == 0
    assert "1 rows of training, fagen, sdpa, plain" in capsys.readouterr().err
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert result["op"] == "training"
    assert {name: facts["outcome"] for name, facts in row["participants"].items()} == dict.fromkeys(
        (OURS, "sdpa", PLAIN), "ok"
    )
    assert row["choice"]["key"] == "backward/fp32/d16/causal/deterministic/b1/h4-2/q24-k24"
    assert row["best_peer"] == "sdpa" and row["of_plain"] > 0
    assert "; training; `" in markdown.read_text()
    assert "of plain" in markdown.read_text()


def small(row: rows.Row) -> rows.Row:
    """The row with few short sequences of small heads, as a CPU computes it."""
    documents = LENGTHS if row.documents else ()
    length = sum(documents) if documents else 24
    sizes = SHAPE | {"head_dim_v": 16, "batch": 1, "seqlen_q": length, "seqlen_k": length}
    window = {"window_left": 7} if row.problem.window_left > 0 else {}
    return dataclasses.replace(row, problem=row.problem.replace(**sizes, **window), documents=documents)


KINDS = [
    ("training", "training", "gpt-oss-20b window127"), ("deterministic", "backward", "doc8-causal"),
    ("dropout", "training", "llama3-8b"), ("documents", "backward", "doc8-full h16"), ("varlen", "forward", "varlen4"),
    ("varlen", "training", "varlen16"), ("ampere", "backward", "d64 causal s1024"),
]  # fmt: skip


@needs_cxx
@pytest.mark.parametrize(("suite", "op", "name"), KINDS)
def test_rows_of_each_suite_are_measured(suite, op, name):
    row = small(next(r for r in suites.suite(suite, GPU, op=op) if r.name.startswith(name)))
    others, absent = peers.load([PLAIN, "math"], "cpu", {}, op)
    prepares = {OURS: by_op.get(op).ours, **{key: entrant.prepare for key, entrant in others.items()}}
    result = run.time_row(row, prepares, target.host(), run.Settings(rounds=3, min_seconds=0.0))
    found = {key: facts["outcome"] for key, facts in result["participants"].items()}
    assert not absent and found[OURS] == found[PLAIN] == "ok", result["participants"]
    assert result["of_plain"] > 0 and result["choice"]["served_by"] == "kernel"
    assert found["math"] == ("ok" if row.problem.mask in ("none", "causal") else "cannot")


def test_wrong_usage(capsys):
    for words, says in (
        (["--op", "training", "--family", "cpu_backward"], "add --op backward"),
        (["--op", "training", "--host"], "--host times calls of forward"),
        (["--op", "training", "--suite", "softmax"], "has no rows of training"),
        (["--op", "training", "--peers", "flashinfer"], "flashinfer"),
    ):
        assert main.main(["bench", "--target", "cpu", *words]) == 2
        assert says in capsys.readouterr().err


def test_plain_needs_a_row_that_asks_for_more(capsys):
    assert peers.chosen("all", "cpu", "training") == ["sdpa"]
    assert attention.load_plain({}).by_op.keys() == {"forward", "backward", "training"}
