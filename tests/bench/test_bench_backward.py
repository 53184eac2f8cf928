"""fagen bench --op backward: rows, peers launched without autograd or through it, refusals, runs on the CPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from fagen import target
from fagen.bench import autograd, by_op, compare, flash, flash_backward, flex, peers, rows, run, sdpa, suites
from fagen.bench.peers import OURS, Cannot, Loaded, Peer
from fagen.build import toolchain
from fagen.cli import main
from fagen.errors import UsageError
from fagen.ops.attention import fallback
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.problem import Problem

pytestmark = pytest.mark.usefixtures("quick_machine")

GPU = target.known("sm_90")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
needs_cxx = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
SHAPE = {"dtype": "fp32", "heads": 4, "kv_heads": 2, "head_dim": 16}
DOCUMENTS = (5, 17, 1, 9)
MASK_ROWS = [
    rows.row_of_op(row, "backward")
    for row in (
        suites.window_row("window", 40, 7, **SHAPE),
        suites.documents_row("causal documents", DOCUMENTS, causal=True, **SHAPE),
        suites.documents_row("two batches", DOCUMENTS, causal=False, batch=2, **SHAPE),
        suites.prefix_row("prefix", 33, 12, **SHAPE),
    )
]


def row_of(**fields) -> rows.Row:
    return rows.of_problem(BackwardProblem(**{**SHAPE, "seqlen_q": 20, **fields}))


FULL, CAUSAL = row_of(batch=2, head_dim_v=32), row_of(mask="causal")


def half(row: rows.Row) -> rows.Row:
    return dataclasses.replace(row, problem=row.problem.replace(dtype="bf16"))


def right(row, serve, inputs) -> bool:
    return bool(run.verified(serve(inputs), inputs.call, 1 << 30)[0])


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_the_rows_of_peers_without_the_cross_attention():
    forward = {row.name: row for row in suites.suite("peers", GPU)}
    found = {row.name: row for row in suites.suite("peers", GPU, op="backward")}
    assert [*found, "cross-512x8192 full h32/8 d128"] == list(forward)
    assert len(found) == 38
    for name, row in found.items():
        p, was = row.problem, forward[name].problem
        assert p == BackwardProblem(**{**was.to_dict(), "op": "backward"})
        d, dv = p.head_dim, p.head_dim_v
        assert p.flops() == pytest.approx(was.flops() * (3 * d + 2 * dv) / (d + dv))
        assert (row.series, row.op) == (forward[name].series, "backward")


def test_deterministic_rows_have_names_of_their_own():
    (row, *rest) = suites.suite("masks", GPU, op="backward", same_bits=True)
    assert (row.name, row.series) == ("window1024 deterministic", "window1024 deterministic")
    assert all(rows.deterministic(r.problem) for r in (row, *rest))
    assert not any(rows.deterministic(r.problem) for r in suites.suite("masks", GPU, op="backward"))


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("row", [FULL, MASK_ROWS[1]], ids=lambda row: row.name)
def test_what_must_be_moved_is_what_a_call_holds(row, op):
    row = rows.row_of_op(row, op)
    inputs = rows.make_inputs(row, "cpu")
    held = {**inputs.call.inputs(), **inputs.outputs}
    moved = [t.nbytes for name, t in held.items() if name != "intervals" and (name, op) != ("lse", "forward")]
    assert rows.least_bytes(row) == sum(moved)


@pytest.mark.parametrize("row", [FULL, CAUSAL, *MASK_ROWS], ids=lambda row: row.name)
def test_o_and_lse_follow_from_the_mask_of_the_row(row):
    inputs = rows.make_inputs(row, "cpu")
    gradients = fallback.gradients(inputs.call.forward, inputs.call.dout, None)
    for cells, checked in ((1 << 30, "all"), (1, "a sample of heads, rows and keys")):
        verdict, how = run.verified(gradients, inputs.call, cells)
        assert verdict, verdict.message
        assert how == checked
    for n in range(3):
        wrong = [t * (1.0 + 0.01 * (n == at)) for at, t in enumerate(gradients)]
        assert not run.verified(tuple(wrong), inputs.call, 1 << 30)[0]
        assert not run.verified(tuple(wrong), inputs.call, 1)[0]
    assert not inputs.damage()
    forward = rows.row_of_op(row, "forward")
    share = rows.flops(row, inputs.call) / rows.flops(forward, rows.make_inputs(forward, "cpu").call)
    d, dv = row.problem.head_dim, row.problem.head_dim_v
    assert share == pytest.approx((3 * d + 2 * dv) / (d + dv))


def test_few_rows_on_many_keys_are_no_matter():
    assert not by_op.get("backward").needs_split_keys(BackwardProblem(heads=1, seqlen_q=128, seqlen_k=8192), GPU)


# ---- peers ----------------------------------------------------------------------------------------------------------


SDPA_ROWS = [CAUSAL, FULL, row_of(kv_heads=4), row_of(mask="causal", deterministic=True)]


@pytest.mark.parametrize("row", SDPA_ROWS, ids=lambda row: row.name)
def test_sdpa_is_launched_without_the_engine(row):
    """The node of its fused backward alone; where there is none, as by the math backend, the engine runs the graph."""
    row = dataclasses.replace(row, problem=row.problem.replace(head_dim_v=16))
    inputs, engine = rows.make_inputs(row, "cpu"), torch.autograd.grad
    fused, by_math = sdpa.sdpa({}).by_op["backward"](row, inputs), sdpa.math({}).by_op["backward"](row, inputs)
    for serve, runs in ((fused, 0), (by_math, 2)):
        with mock.patch.object(torch.autograd, "grad", side_effect=engine) as grad:
            found = [serve(inputs) for _ in range(2)]  # the graph is kept
        assert grad.call_count == runs
        for gradients in found:
            verdict, _ = run.verified(gradients, inputs.call, 1 << 30)
            assert verdict, verdict.message
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_heads_of_v_leave_sdpa_right():
    """Where a backend pads or expands, there is more in the graph than its node."""
    inputs = rows.make_inputs(FULL, "cpu")
    assert right(FULL, sdpa.sdpa({}).by_op["backward"](FULL, inputs), inputs)


def test_pytorch_is_held_to_the_same_bits(monkeypatch):
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*words, **more):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return attend(*words, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for row in (CAUSAL, row_of(mask="causal", deterministic=True)):
        inputs = rows.make_inputs(row, "cpu")
        del seen[:]
        sdpa.sdpa({}).by_op["backward"](row, inputs)(inputs)
        assert seen == [row.problem.deterministic]
        assert not torch.are_deterministic_algorithms_enabled()


def test_the_engine_stays_out_of_a_capture(monkeypatch):
    inputs = rows.make_inputs(CAUSAL, "cpu")
    serve = sdpa.math({}).by_op["backward"](CAUSAL, inputs)
    serve(inputs)
    monkeypatch.setattr(autograd, "_is_captured", lambda t: True)
    with pytest.raises(RuntimeError, match="outside of a capture"):
        serve(inputs)


@pytest.mark.parametrize("row", [CAUSAL, *MASK_ROWS], ids=lambda row: row.name)
def test_any_forward_is_differentiated(row):
    """As FlexAttention's is, which has no backward on a CPU."""
    inputs = rows.make_inputs(row, "cpu")
    serve = autograd.through_autograd(lambda row, inputs: lambda i: fallback.attend(i.call)[0])(row, inputs)
    assert right(row, serve, inputs)
    assert right(row, serve, inputs)


def test_flex_promises_no_bits():
    row = row_of(deterministic=True)
    with pytest.raises(Cannot, match="no deterministic mode"):
        flex.load({}, compiled=False).by_op["backward"](row, rows.make_inputs(row, "cpu"))


def schema(text: str):
    return torch._C.parse_schema(f"flash_attn_3::bwd({text}) -> (Tensor, Tensor)")


READ = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
NEW = schema(
    READ + "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None,"
    " Tensor? cu_seqlens_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None,"
    " bool is_causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0.0,"
    " bool deterministic=False, int sm_margin=0"
)
OLD = schema(
    READ + "Tensor(dq!)? dq, Tensor(dk!)? dk, Tensor(dv!)? dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? seqused_q, int? max_seqlen_q, int? max_seqlen_k, float softmax_scale, bool causal,"
    " int window_size_left, int window_size_right, float softcap, int sm_margin"
)


def gradients_of(q, k, v, dout, *, causal):
    """Those of one batch of sequences, all of a length."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(*(t.transpose(1, 2) for t in leaves), is_causal=causal, enable_gqa=True).transpose(1, 2)
    return torch.autograd.grad(out, leaves, dout)


def answer(q, k, v, out, dout, lse, cu_seqlens_q, longest, causal):
    assert (out.shape, out.dtype) == (dout.shape, q.dtype)
    assert lse.is_contiguous() and lse.dtype == torch.float32
    if cu_seqlens_q is None:
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        return gradients_of(q, k, v, dout, causal=causal)
    assert lse.shape == (q.shape[1], q.shape[0])
    assert longest == max(DOCUMENTS)
    ends, parts = cu_seqlens_q.tolist(), []
    for a, b in zip(ends, ends[1:], strict=False):
        part = gradients_of(*(t[None, a:b] for t in (q, k, v, dout)), causal=causal)
        assert torch.isfinite(lse[:, a:b]).all()
        parts.append([t[0] for t in part])
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class FakeOp:
    """Fills the gradients that it is given, and returns something else."""

    def __init__(self, its):
        self._schema, self.given = its, {}

    def __call__(self, *, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q=None, max_seqlen_q=None, **rest):
        self.given = rest
        causal = rest["is_causal" if "is_causal" in rest else "causal"]
        found = answer(q, k, v, out, dout, softmax_lse, cu_seqlens_q, max_seqlen_q, causal)
        for room, t in zip((dq, dk, dv), found, strict=True):
            room.copy_(t)
        return [softmax_lse]


FLASH_ROWS = [half(row) for row in (CAUSAL, FULL, MASK_ROWS[1], MASK_ROWS[2])]


@pytest.mark.parametrize("its", [NEW, OLD], ids=["new", "old"])
@pytest.mark.parametrize("row", FLASH_ROWS, ids=lambda row: row.name)
def test_flash_attention_3_is_called_by_its_schema(row, its):
    op, inputs = FakeOp(its), rows.make_inputs(row, "cpu")
    serve = flash_backward.through_op(op)(row, inputs)
    assert right(row, serve, inputs)
    assert (op.given["window_size_left"], op.given["window_size_right"]) == (-1, -1)
    assert all(t.isnan().all() for t in inputs.outputs.values()), "its gradients are its own"
    assert not inputs.damage()


def test_a_gradient_that_flash_attention_3_does_not_write_is_wrong():
    row = half(CAUSAL)
    inputs = rows.make_inputs(row, "cpu")

    class Lazy(FakeOp):
        def __call__(self, *, dk, **words):
            return super().__call__(dk=dk.clone(), **words)

    serve = flash_backward.through_op(Lazy(NEW))(row, inputs)
    assert not right(row, serve, inputs)


@pytest.mark.parametrize(
    ("its", "row", "says"),
    [
        (OLD, row_of(deterministic=True), "no argument deterministic"),
        (schema("Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"), FULL, "no argument dk"),
        (schema(READ + "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv"), row_of(softcap=True), "no argument softcap"),
        (NEW, row_of(alibi=True), "no ALiBi"),
        (NEW, MASK_ROWS[3], "no such mask"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_flash_attention_3_says_what_does_not_fit(its, row, says):
    row = half(row)
    with pytest.raises(Cannot, match=says):
        flash_backward.through_op(FakeOp(its))(row, rows.make_inputs(row, "cpu"))


def of_cute(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, dq=None,
):  # fmt: skip
    """As FlashAttention 4 names its arguments."""
    assert (window_size_left, window_size_right, m_block_size) == (None, None, 64)
    assert softmax_scale == pytest.approx(1 / math.sqrt(q.shape[-1]))
    return answer(q, k, v, out, dout, lse, cu_seqlens_q, max_seqlen_q, causal)


@pytest.mark.parametrize("row", FLASH_ROWS, ids=lambda row: row.name)
def test_flash_attention_4_is_called_by_its_signature(row):
    inputs = rows.make_inputs(row, "cpu")
    assert right(row, flash_backward.through_function(of_cute)(row, inputs), inputs)


def test_flash_attention_4_says_what_does_not_fit():
    for row, says in ((half(row_of(deterministic=True)), "deterministic"), (half(MASK_ROWS[3]), "no such mask")):
        with pytest.raises(Cannot, match=says):
            flash_backward.through_function(of_cute)(row, rows.make_inputs(row, "cpu"))
    plain = lambda q, k, v, out, dout, lse, softmax_scale, causal: None  # noqa: E731
    row = half(MASK_ROWS[2])
    inputs = rows.make_inputs(row, "cpu")
    with pytest.raises(Cannot, match="no argument cu_seqlens_q"):
        flash_backward.through_function(plain)(row, inputs)


def test_peers_without_gradients_have_a_reason(monkeypatch):
    cute = types.ModuleType("flash_attn.cute.interface")
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, cute.__name__, cute)
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setattr(flash, "_load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "flash_attn_3", types.SimpleNamespace(fwd=types.SimpleNamespace(default=None)))
    names, paths = ["fa3", "fa4", "flashinfer"], {"fa3": Path("_C.so")}
    here, absent = peers.load(names, "cuda", paths, "backward")
    assert (here, absent) == (
        {},
        {
            "fa3": "it registers no op flash_attn_3::bwd",
            "fa4": "flash_attn.cute.interface has no _flash_attn_bwd",
            "flashinfer": "it computes no backward here",
        },
    )
    here, absent = peers.load(names, "cuda", paths)
    assert (list(here), absent) == (names, {})
    torch.ops.flash_attn_3.bwd = types.SimpleNamespace(default=FakeOp(NEW))
    cute._flash_attn_bwd = of_cute
    here, absent = peers.load(names, "cuda", paths, "backward")
    assert list(here) == ["fa3", "fa4"]
    row = half(CAUSAL)
    inputs = rows.make_inputs(row, "cpu")
    assert all(right(row, loaded.prepare(row, inputs), inputs) for loaded in here.values())


def test_every_set_of_inputs_is_met_before_the_clock_runs():
    sets = [rows.make_inputs(CAUSAL, "cpu", seed) for seed in range(3)]
    met = []

    def prepare(row, inputs):
        serve = sdpa.sdpa({}).by_op["backward"](row, inputs)
        return lambda i: (met.append(i), serve(i))[1]

    facts, serve = run.prepared(prepare, CAUSAL, sets[0], "cpu", "sdpa", sets[1:])
    assert facts["outcome"] == "ok" and serve is not None
    assert all(a is b for a, b in zip(met, sets, strict=True))


# ---- whole runs -----------------------------------------------------------------------------------------------------

TINY = "--target cpu --dtype fp32 --head-dim 16 --mask none,causal --seqlen 24 --heads 4 --kv-heads 2".split()
QUICK = "--rounds 3 --min-time 0.01".split()


@pytest.mark.slow
@needs_cxx
def test_a_run_of_backward(tmp_path, capsys, monkeypatch):
    def wrong(row, inputs):
        serve = sdpa.sdpa({}).by_op["backward"](row, inputs)
        return lambda i: tuple(t * 1.01 for t in serve(i))

    planted = types.ModuleType("planted")
    monkeypatch.setattr(planted, "wrong", lambda paths: Loaded({"backward": wrong}, "0.1"), raising=False)
    monkeypatch.setattr(planted, "mute", lambda paths: Loaded({"forward": wrong}), raising=False)
    monkeypatch.setitem(sys.modules, "planted", planted)
    for name in ("wrong", "mute"):
        monkeypatch.setitem(peers.PEERS, name, Peer(name, ("cpu",), f"planted:{name}"))
    files = [tmp_path / "x.json", tmp_path / "x.md", tmp_path / "x.csv"]
    words = ["bench", "--op", "backward", *TINY, *QUICK, "--peers", "sdpa,wrong,mute", "--out", str(files[0])]
    assert main.main([*words, "--markdown", str(files[1]), "--csv", str(files[2])]) == 0
    err = capsys.readouterr().err
    assert "2 rows of backward, fagen, sdpa, wrong" in err
    assert "absent: mute: it computes no backward here" in err
    result = json.loads(files[0].read_text())
    assert (result["op"], result["complete"], result["summary"]["compared"]) == ("backward", True, 2)
    for row in result["rows"]:
        found = row["participants"]
        assert {name: facts["outcome"] for name, facts in found.items()} == {
            "fagen": "ok", "sdpa": "ok", "wrong": "wrong"
        }  # fmt: skip
        assert row["key"] == f"backward/{row['name']}"
        assert row["flops"] == BackwardProblem.from_dict(row["problem"]).flops()
        assert (row["choice"]["family"], row["choice"]["served_by"]) == ("cpu_backward", "kernel")
        assert row["ratio"] == pytest.approx(found[OURS]["tflops"] / found["sdpa"]["tflops"])
    text = files[1].read_text()
    assert "; backward; `" in text
    assert text.count("\n| fp32/d16/") == 2
    assert files[2].read_text().count("\n") == 1 + 2 * 3

    compared = ["--peers", "none", "--compare", str(files[0])]
    assert main.main(["bench", "--op", "forward", *TINY, *QUICK, *compared]) == 2
    assert "another op" in capsys.readouterr().err
    for row in result["rows"]:  # what ours was once; no load of the machine makes up for it
        row["participants"][OURS]["tflops"] *= 1e4
    files[0].write_text(json.dumps(result))
    assert main.main(["bench", "--op", "backward", *TINY, *QUICK, *compared]) == 1
    assert "slower: fp32/d16/none" in capsys.readouterr().err


@needs_cxx
def test_ours_held_to_a_family_and_deterministic(tmp_path, capsys):
    """A file of forward problems is measured backward, too."""
    (tmp_path / "x.toml").write_text(
        '[[problem]]\ndtype = "fp32"\nhead_dim = 16\nseqlen = 24\nheads = 4\nkv_heads = 2\n'
    )
    words = ["--problems", str(tmp_path / "x.toml"), "--op", "backward", "--deterministic", "--family", "cpu_backward"]
    assert main.main(["bench", "--target", "cpu", *words, *QUICK, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["name"] == "fp32/d16/none/deterministic/b1/h4-2/q24-k24"
    assert row["problem"]["deterministic"]
    assert {facts["outcome"] for facts in row["participants"].values()} == {"ok"}
    assert (row["choice"]["family"], row["choice"]["provenance"]) == ("cpu_backward", "default")


def test_what_pytorch_computes_of_ours_is_right():
    from fagen.dispatch import resolve

    inputs = rows.make_inputs(CAUSAL, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "kernel_for", lambda problem, where: None)
        assert right(CAUSAL, by_op.get("backward").ours(CAUSAL, inputs), inputs)
        assert by_op.get("backward").choice(CAUSAL, inputs)["served_by"] == "torch"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--op", "forward,backward"], "a run measures one op"),
        (["--op", "sideways"], "sideways"),
        (["--deterministic"], "--deterministic needs op backward"),
        (["--op", "backward", "--host"], "--host times calls of forward"),
        (["--op", "backward", "--family", "cpu_forward"], "add --op forward"),
        (["--family", "cpu_backward"], "add --op backward"),
        (["--op", "backward", "--suite", "peers", "--filter", "cross-512"], "no row is left"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(words, says, capsys):
    assert main.main(["bench", "--target", "cpu", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) <= 3


def test_a_file_of_both_ops_must_be_told_which(tmp_path):
    from fagen.cli.commands import bench

    (tmp_path / "x.toml").write_text('[[problem]]\nop = ["forward", "backward"]\nhead_dim = 64\n')
    parser = argparse.ArgumentParser()
    bench.add(parser.add_subparsers())
    args = parser.parse_args(["bench", "--problems", str(tmp_path / "x.toml")])
    with pytest.raises(UsageError, match="a run measures one op"):
        bench.rows_from(args, GPU)
    args.op = "backward"
    (row,) = bench.rows_from(args, GPU)
    assert row.problem == BackwardProblem(head_dim=64, heads=16)


def test_results_of_forward_are_still_read():
    old = compare.read(BENCHMARKS / "h200_masks.json")
    assert "op" not in old
    compare.require_same(old, old["device"])
    assert compare.regressions(old, old) == ([], [])
    with pytest.raises(UsageError, match="another op"):
        compare.require_same(old, old["device"], "backward")
    assert Problem.from_dict(old["rows"][0]["problem"]).op == "forward"
