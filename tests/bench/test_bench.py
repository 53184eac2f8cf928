"""fagen bench: rows and their masks, peers that are absent, wrong or of other versions, and whole runs on the CPU."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

from fagen import families, ops, target
from fagen.bench import (
    attention,
    by_op,
    compare,
    flash,
    flash_arguments,
    flex,
    peers,
    plot,
    prebuild,
    random_rows,
    report,
    rows,
    run,
    sdpa,
    suites,
)  # fmt: skip
from fagen.bench.flash_arguments import of_schema
from fagen.bench.peers import OURS, Cannot, Loaded, Peer
from fagen.build import toolchain
from fagen.cli import main
from fagen.cli.arguments import problems_in
from fagen.errors import UsageError
from fagen.ops.attention import masks, reference, work
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.inputs import input_bytes
from fagen.ops.attention.problem import INTERVAL_KINDS, Problem
from fagen.timing import load

pytestmark = pytest.mark.usefixtures("quick_machine")

GPU = target.known("sm_90")
needs_cxx = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
TINY = "--target cpu --dtype fp32 --head-dim 16 --mask none,causal --seqlen 24,48 --heads 4 --kv-heads 2".split()
QUICK = "--rounds 3 --min-time 0.01".split()
DOCUMENTS = (5, 17, 1, 9)
SHAPE = {"dtype": "fp32", "heads": 4, "kv_heads": 2, "head_dim": 16}


# ---- ops ------------------------------------------------------------------------------------------------------------


def test_one_table_knows_the_ops_by_name():
    assert {op.name for op in ops.all_ops()} | {rows.TRAINING} == set(by_op.OPS)
    with pytest.raises(UsageError, match="measures no 'nothing'"):
        by_op.get("nothing")
    folder = Path(by_op.__file__).parent
    for name in ("rows", "run", "suites", "peers", "prebuild", "family", "ours", "attention", "softmax", "decode"):
        text = (folder / f"{name}.py").read_text()
        assert not re.search(r"""[!=]= ["'](forward|backward|training|decode|softmax)["']|[!=]= softmax\.OP""", text), (
            name
        )


# ---- suites ---------------------------------------------------------------------------------------------------------

PINNED = [  # the first rows of random with seed 7
    "random-00 d136 full b16 h8/1 q1487 k1487",
    "random-01 d232 full b3 h4/4 q10769 k6341",
    "random-02 d240 causal b1 h48/16 q87 k87",
]
# name: batch, heads, kv heads, rows, keys, head dims, causal
GRID = {
    f"d{label} {mask} s{length} b{batch} h{heads}": (batch, heads, heads, length, length, dims, mask == "causal")
    for label, dims, heads in (
        ("64", (64, 64), 32), ("96", (96, 96), 21), ("128", (128, 128), 16), ("192-128", (192, 128), 10),
        ("256", (256, 256), 8),
    )
    for mask in ("full", "causal")
    for length, batch in ((512, 32), (2048, 8), (8192, 2))
}  # fmt: skip
LAYERS = {
    "llama3-8b causal s8192 b1 h32/8 d128": (1, 32, 8, 8192, 8192, (128, 128), True),
    "llama3-70b causal s4096 b1 h64/8 d128": (1, 64, 8, 4096, 4096, (128, 128), True),
    "qwen3-4b causal s2048 b4 h32/8 d128": (4, 32, 8, 2048, 2048, (128, 128), True),
    "gpt2-small causal s1024 b32 h12/12 d64": (32, 12, 12, 1024, 1024, (64, 64), True),
    "gemma-d256 causal s8192 b1 h16/8 d256": (1, 16, 8, 8192, 8192, (256, 256), True),
    "small-b1-s512 causal s512 b1 h16/16 d64": (1, 16, 16, 512, 512, (64, 64), True),
    "small-b1-s1k causal s1024 b1 h32/8 d128": (1, 32, 8, 1024, 1024, (128, 128), True),
    "bert-b32-s128 causal s128 b32 h12/12 d64": (32, 12, 12, 128, 128, (64, 64), True),
    "cross-512x8192 full h32/8 d128": (1, 32, 8, 512, 8192, (128, 128), False),
}


def test_the_peers_suite_is_the_known_39_rows():
    found = {row.name: row.problem for row in suites.suite("peers", GPU)}
    assert list(found) == [*GRID, *LAYERS]
    assert len(found) == 39
    for name, (batch, heads, kv_heads, seqlen_q, seqlen_k, dims, causal) in (GRID | LAYERS).items():
        assert found[name] == Problem(
            dtype="bf16", head_dim=dims[0], head_dim_v=dims[1], mask="causal" if causal else "none", batch=batch,
            heads=heads, kv_heads=kv_heads, seqlen_q=seqlen_q, seqlen_k=seqlen_k,
        )  # fmt: skip


def test_random_rows_follow_from_the_seed_alone():
    """The same anywhere: these were written down once."""
    names = [row.name for row in suites.suite("random", GPU, 7)]
    assert names == [row.name for row in suites.suite("random", target.host(), 7)]
    assert names[:3] == PINNED
    assert len({tuple(row.name for row in random_rows.suite(seed)) for seed in range(50)}) == 50


def test_random_rows_are_legal_bounded_and_all_over_the_place():
    found = [row.problem for seed in range(16) for row in random_rows.suite(seed)]
    for p in found:
        assert all(n % 2 and 64 <= n <= 11001 for n in (p.seqlen_q, p.seqlen_k))
        assert p.head_dim % 8 == 0 and 32 <= p.head_dim <= 256 and 1 <= p.heads // p.kv_heads <= 8 and p.heads <= 64
        assert p.mask == "none" or p.seqlen_k >= p.seqlen_q, "a row without a key is no work"
        assert p.batch == 1 or p.flops() <= random_rows.MOST_FLOPS
        assert p.flops() < 1e13 and input_bytes(p) <= random_rows.MOST_BYTES
        for name in ("sm90_forward", "sm80_forward"):
            family = families.get(name)
            assert family.supports(p, GPU) is None
    for p in found[::40]:  # each is served without a record
        family = families.get("sm90_forward")
        family.require(p, GPU, family.default(p, GPU))
    assert {p.head_dim for p in found} == set(random_rows.HEAD_DIMS)
    assert {p.heads // p.kv_heads for p in found} == set(range(1, 9))
    assert {p.mask for p in found} == {"none", "causal", "window"}
    assert 0.3 < sum(p.seqlen_q == p.seqlen_k for p in found) / len(found) < 0.7
    octaves = [sum(64 << n <= p.seqlen_q < 128 << n for p in found) for n in range(7)]
    assert min(octaves) > len(found) / 25, "each doubling has its share"


@pytest.mark.parametrize(
    ("problem", "needs"),
    [
        (Problem(heads=16, seqlen_q=128, seqlen_k=8192), True),
        (Problem(heads=16, seqlen_q=128, seqlen_k=511), False),  # few keys: nothing to share
        (Problem(heads=131, seqlen_q=128, seqlen_k=8192), True),
        (Problem(heads=132, seqlen_q=128, seqlen_k=8192), False),  # a block for each SM
        (Problem(heads=66, seqlen_q=129, seqlen_k=8192), False),
        (Problem(heads=16, seqlen_q=128, seqlen_k=8192, mask="window", window_left=100, window_right=0), False),
    ],
    ids=str,
)
def test_few_rows_on_many_keys_are_told(problem, needs):
    assert by_op.get(problem.op).needs_split_keys(problem, GPU) is needs
    assert not by_op.get(problem.op).needs_split_keys(problem, target.host())


@pytest.mark.parametrize("name", suites.SUITES)
def test_rows_of_a_suite_have_names_of_their_own(name):
    found = suites.suite(name, GPU, op=suites.SUITES[name].ops[0])
    assert len({row.name for row in found}) == len(found) >= 2
    assert all(row.series for row in found)


def test_few_rows_are_what_splits_are_for():
    found = suites.suite("few_rows", GPU)
    needing = [row for row in found if by_op.get(row.op).needs_split_keys(row.problem, GPU)]
    family = families.get("sm90_forward")
    split = [row for row in needing if family.default(row.problem, GPU).splits == "keys"]
    assert len(found) == 23 and len(needing) >= 20 and len(split) >= 20
    assert {row.problem.mask for row in found} == {"none", "causal"}
    tuned = problems_in(Path(__file__).parents[2] / "benchmarks" / "problems" / "few_rows.toml", GPU)
    assert tuned == [row.problem for row in found]


def test_large_head_dims_are_tuned_for_as_they_are_measured():
    found = suites.suite("large-d", GPU)
    assert len(found) == 43 and min(max(row.problem.head_dim, row.problem.head_dim_v) for row in found) == 320
    family = families.get("sm90_forward_large")
    assert all(family.supports(row.problem, GPU) is None for row in found)
    tuned = problems_in(Path(__file__).parents[2] / "benchmarks" / "problems" / "large_d.toml", GPU)
    assert tuned == [row.problem for row in found]


def test_gradients_of_large_head_dims_are_tuned_for_as_they_are_measured():
    found, family = suites.suite("large-d", GPU, op="backward"), families.get("sm90_backward_large")
    assert len(found) == 43 and all(family.supports(row.problem, GPU) is None for row in found)
    tuned = problems_in(Path(__file__).parents[2] / "benchmarks" / "problems" / "large_d_backward.toml", GPU)
    assert tuned == [row.problem for row in found]


def test_odd_head_dims_stand_beside_the_kernel_that_serves_them():
    found = suites.suite("odd-d", GPU)
    assert len(found) == 40
    for odd, even in zip(found[::2], found[1::2], strict=True):
        assert odd.problem.head_dim % 16 == 8 and odd.problem.static_key == even.problem.static_key
        assert odd.problem.size_key == even.problem.size_key


def test_the_models_suite_slides():
    found = {row.name: row.problem for row in suites.suite("models", GPU)}
    assert set(LAYERS) - {"cross-512x8192 full h32/8 d128"} <= set(found)
    sliding = found["gpt-oss-20b-sliding window127 s4096 b4 h64/8 d64"]
    assert (sliding.mask, sliding.window_left, sliding.window_right) == ("window", 127, 0)
    assert found["deepseek-v3-prefill causal s16384 b1 h128/128 d192-128"].head_dim_v == 128


def test_the_masks_suite():
    found = {row.name: row for row in suites.suite("masks", GPU)}
    assert list(found) == ["window1024", "doc8-causal", "doc8-full", "prefix4096"]
    assert len(suites.DOCUMENTS) == 8 == len(set(suites.DOCUMENTS))
    assert {(r.problem.seqlen_q, r.problem.heads, r.problem.batch) for r in found.values()} == {(16384, 16, 1)}
    window = found["window1024"].problem
    assert window.visible() == sum(min(i, 1024) + 1 for i in range(16384)), "1025 keys, its own among them"
    squares = [n * n for n in suites.DOCUMENTS]
    for name, cells in (
        ("doc8-full", sum(squares)),
        ("doc8-causal", sum(n * (n + 1) // 2 for n in suites.DOCUMENTS)),
        ("prefix4096", 16384 * 16385 // 2 + 4096 * 4095 // 2),
    ):
        row = found[name]
        small = row.problem.replace(head_dim=1, head_dim_v=1, heads=1, kv_heads=1)
        inputs = rows.make_inputs(dataclasses.replace(row, problem=small), "cpu")
        assert work.visible_cells(row.problem, inputs.call.intervals) == cells
        assert rows.flops(row, inputs.call) == 4.0 * cells * 128 * 16


# ---- masks ----------------------------------------------------------------------------------------------------------


def brute(row: rows.Row) -> torch.Tensor:
    """Who sees whom, cell by cell, from the row's own words."""
    p = row.problem
    ids = [n for n, length in enumerate(row.documents) for _ in range(length)]
    seen = torch.zeros(p.seqlen_q, p.seqlen_k, dtype=torch.bool)
    for i in range(p.seqlen_q):
        for j in range(p.seqlen_k):
            ok = not ids or ids[i] == ids[j]
            ok &= not row.causal or j <= i
            ok &= p.window_left < 0 or i - j <= p.window_left
            if row.prefix:
                ok &= j < row.prefix or j <= i
            seen[i, j] = ok
    return seen


MASK_ROWS = [
    suites.window_row("window", 40, 7, **SHAPE),
    suites.documents_row("causal documents", DOCUMENTS, causal=True, **SHAPE),
    suites.documents_row("documents", DOCUMENTS, causal=False, **SHAPE),
    suites.documents_row("two batches", DOCUMENTS, causal=True, batch=2, **SHAPE),
    suites.prefix_row("prefix", 33, 12, **SHAPE),
]


@pytest.mark.parametrize("row", MASK_ROWS, ids=lambda row: row.name)
def test_masks_are_what_their_names_say(row):
    inputs, want, p = rows.make_inputs(row, "cpu"), brute(row), row.problem
    given = {"intervals": inputs.call.intervals, "kind": p.intervals}
    seen = masks.dense(p.seqlen_q, p.seqlen_k, window=(p.window_left, p.window_right), **given)
    assert torch.equal(seen[0, 0], want)
    assert rows.flops(row, inputs.call) == 4.0 * int(want.sum()) * 16 * p.heads * p.batch
    from torch.nn.attention.flex_attention import create_mask

    theirs = create_mask(flex.mask_mod(row, inputs.call), None, None, p.seqlen_q, p.seqlen_k, device="cpu")
    assert torch.equal(theirs[0, 0], want)


@pytest.mark.parametrize("kind", INTERVAL_KINDS)
def test_any_intervals_are_counted_and_handed_to_flex(kind):
    from torch.nn.attention.flex_attention import create_mask

    problem = Problem(**SHAPE, mask="intervals", intervals=kind, batch=2, seqlen_q=30, seqlen_k=41)
    row = rows.of_problem(problem)
    assert row.causal == (kind == "lower2"), "two columns mean this only where the call is causal"
    inputs, p = rows.make_inputs(row, "cpu"), row.problem
    seen = masks.dense(30, 41, window=(p.window_left, p.window_right), intervals=inputs.call.intervals, kind=kind)
    assert work.visible_cells(p, inputs.call.intervals) == int(seen.sum())
    theirs = create_mask(flex.mask_mod(row, inputs.call), 2, 1, 30, 41, device="cpu")
    assert torch.equal(theirs, seen.expand_as(theirs))
    shown = by_op.get(row.op).ours(row, inputs)(inputs)
    assert run.verified(shown, inputs.call, 1 << 30)[0]


SCORES = rows.of_problem(Problem(**SHAPE, mask="causal", softcap=True, alibi=True, seqlen_q=20, seqlen_k=31))
ALIBI = rows.of_problem(Problem(**SHAPE, batch=3, alibi=True, seqlen_q=20))
CAUSAL = rows.of_problem(Problem(**SHAPE, mask="causal", seqlen_q=20))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("row", [*MASK_ROWS, SCORES], ids=lambda row: row.name)
def test_flex_and_ours_agree_with_the_oracle(row):
    inputs = rows.make_inputs(row, "cpu")
    for prepare in (flex._prepare(compiled=False), attention.ours, attention.ours_eager):
        verdict, checked = run.verified(prepare(row, inputs)(inputs), inputs.call, 1 << 30)
        assert verdict, verdict.message
        assert checked == "all"


# ---- verification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [MASK_ROWS[3], ALIBI], ids=lambda row: row.name)
def test_long_rows_are_verified_on_some_of_their_heads(row):
    inputs = rows.make_inputs(row, "cpu")
    out = by_op.get(row.op).ours(row, inputs)(inputs)
    verdict, checked = run.verified(out, inputs.call, 1)
    assert verdict, verdict.message
    assert checked == f"2 of {row.problem.batch * 2} kv heads"
    out[-1, 3, -1, 2] += 0.5  # in the last head, which is always looked at
    assert not run.verified(out, inputs.call, 1)[0]
    out[-1, 3, -1, 2] = float("nan")
    assert not run.verified(out, inputs.call, 1)[0]


# ---- peers ----------------------------------------------------------------------------------------------------------


def test_peers_are_chosen_by_name():
    assert peers.chosen("all", "cuda") == ["cudnn", "fa2", "flash_attn", "fa3", "fa4", "flex", "flashinfer"]
    assert peers.chosen("all", "cpu") == ["sdpa"]
    assert peers.chosen("none", "cpu") == []
    assert peers.chosen("fa3, flex,fa3", "cuda") == ["fa3", "flex"]
    with pytest.raises(UsageError, match="fa9"):
        peers.chosen("fa9", "cuda")


def test_absent_peers_have_a_reason(tmp_path, monkeypatch):
    broken = types.ModuleType("broken")
    monkeypatch.setattr(broken, "load", lambda paths: 1 / 0, raising=False)
    monkeypatch.setitem(sys.modules, "broken_peer", broken)
    monkeypatch.setitem(peers.PEERS, "broken", Peer("broken", ("cuda",), "broken_peer:load"))
    for package in ("flashinfer", "flash_attn", "flash_attn.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    names = ["fa3", "fa4", "flashinfer", "flash_attn", "broken"]
    here, absent = peers.load(names, "cuda", {"fa3": tmp_path / "_C.so", "fa4": tmp_path})
    assert here == {}
    assert "is no file" in absent["fa3"]
    assert "holds no flash_attn/cute" in absent["fa4"]
    assert absent["broken"] == "ZeroDivisionError: division by zero"
    assert absent["flashinfer"].endswith("; pip install flashinfer-python")
    assert "pip install flash-attn " in absent["flash_attn"]
    _, absent = peers.load(names, "cpu", {})
    assert set(absent.values()) == {"it needs a GPU"}
    shown = report.absent({name: {"absent": absent.get(name, "")} for name in names})
    assert shown == ["absent: fa3, fa4, flashinfer, flash_attn, broken: it needs a GPU"]


def test_flash_attention_2_and_4_share_a_name(tmp_path, monkeypatch):
    (tmp_path / "two" / "flash_attn").mkdir(parents=True)
    (tmp_path / "two" / "flash_attn" / "__init__.py").touch()
    for path in ("two/flash_attn/flash_attn_interface.py", "four/flash_attn/cute/interface.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("def flash_attn_func(): ...\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "two"), *sys.path])
    with mock.patch.dict(sys.modules):
        for module in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[module]
        here, absent = peers.load(["flash_attn", "fa4"], "cuda", {"fa4": tmp_path / "four"})
    assert (list(here), absent) == (["flash_attn", "fa4"], {})


def schema(text: str):
    return torch._C.parse_schema(f"flash_attn_3::fwd({text}) -> (Tensor, Tensor)")


NEW = schema(
    "Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None,"
    " Tensor? cu_seqlens_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None,"
    " bool is_causal=False, int window_size_left=-1, int window_size_right=-1, int attention_chunk=0,"
    " float softcap=0.0, int num_splits=0, bool? pack_gqa=None, int sm_margin=0"
)
OLD = schema(
    "Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " int? max_seqlen_q, int? max_seqlen_k, float softmax_scale, bool causal, int window_size_left,"
    " int window_size_right, int sink_token_length, bool is_rotary_interleaved, float scale_v, int window_chunk"
)


def test_arguments_of_flash_attention_3_are_filled_by_name():
    row = suites.window_row("window", 40, 7)
    wanted = flash_arguments.settings(row, -1)
    given = flash_arguments.fill(of_schema(NEW), wanted)
    assert given.pop("softmax_scale") == pytest.approx(128**-0.5)
    assert given == {
        "is_causal": False, "window_size_left": 7, "window_size_right": 0, "softcap": 0.0,
        "num_splits": 1,
    }  # fmt: skip
    given = flash_arguments.fill(of_schema(OLD), flash_arguments.settings(rows.of_problem(Problem(mask="causal")), -1))
    assert given["causal"] is True
    assert (given["window_size_left"], given["window_size_right"], given["window_chunk"]) == (-1, -1, -1)
    assert (given["k_new"], given["sink_token_length"], given["is_rotary_interleaved"]) == (None, 0, False)
    assert given["scale_v"] == 0.0
    with pytest.raises(Cannot, match="softcap"):
        flash_arguments.fill(of_schema(OLD), flash_arguments.settings(rows.of_problem(Problem(softcap=True)), -1))


class FakeOp:
    """Takes what the real op takes, and answers as it does."""

    _schema = NEW

    def __call__(self, *, q, k, v, cu_seqlens_q=None, is_causal=False, **rest):
        assert rest["window_size_left"] == -1
        if cu_seqlens_q is None:
            return by_sdpa(q, k, v, is_causal), None
        assert (rest["max_seqlen_q"], cu_seqlens_q.dtype) == (max(DOCUMENTS), torch.int32)
        ends = cu_seqlens_q.tolist()
        parts = [
            by_sdpa(*(t[None, a:b] for t in (q, k, v)), is_causal)[0] for a, b in zip(ends, ends[1:], strict=False)
        ]
        return torch.cat(parts), None


def by_sdpa(q, k, v, causal):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def half(row: rows.Row) -> rows.Row:
    """What the libraries for GPUs take."""
    return dataclasses.replace(row, problem=row.problem.replace(dtype="bf16"))


@pytest.mark.parametrize("row", [half(row) for row in (*MASK_ROWS[1:4], CAUSAL)], ids=lambda row: row.name)
def test_documents_are_a_varlen_batch_of_flash_attention(row):
    inputs, op = rows.make_inputs(row, "cpu"), FakeOp()

    def varlen(q, k, v, *, causal, window_size, softcap, **rest):
        return op(q=q, k=k, v=v, is_causal=causal, window_size_left=window_size[0] or -1, **rest)

    def plain(q, k, v, *, causal, window_size, softcap):
        return by_sdpa(q, k, v, causal)

    module = types.SimpleNamespace(flash_attn_func=plain, flash_attn_varlen_func=varlen)
    for prepare in (flash._through_op(op), flash._through_functions(module, None)):
        verdict, _ = run.verified(prepare(row, inputs)(inputs), inputs.call, 1 << 30)
        assert verdict, verdict.message


class FakeFlashInfer:
    """Its two ways to prefill, on (tokens, heads, dim); causal is bottom-right aligned, window_left inclusive."""

    def __init__(self):
        self.plans, self.singles, self.layouts = 0, 0, set()
        self.BatchPrefillWithRaggedKVCacheWrapper = lambda *words: FakeRagged(self, *words)

    def single_prefill_with_kv_cache(self, q, k, v, *, causal, kv_layout, window_left, logits_soft_cap):
        self.singles += 1
        self.layouts.add(kv_layout)
        return self.attend(q, k, v, causal, window_left, logits_soft_cap)

    @staticmethod
    def attend(q, k, v, causal, window_left, cap):
        assert q.dim() == k.dim() == v.dim() == 3
        assert k.shape[:2] == v.shape[:2]
        assert q.shape[2] == k.shape[2]
        assert q.shape[1] % k.shape[1] == 0
        seen = masks.dense(len(q), len(k), window=(window_left, 0 if causal else -1))
        call = AttentionCall(*(t[None] for t in (q, k, v)), softcap=cap or 0.0)
        out, _ = reference.attend(call, call.bhsd(), seen)
        return out[0].transpose(0, 1).contiguous()


class FakeRagged:
    def __init__(self, library, workspace, layout):
        assert workspace.dtype == torch.uint8
        assert workspace.numel() >= 128 << 20
        self.library = library
        library.layouts.add(layout)

    def plan(
        self, of_q, of_k, heads, kv_heads, dim, head_dim_vo, *, causal, window_left, logits_soft_cap, q_data_type
    ):  # fmt: skip
        self.library.plans += 1
        assert of_q.dtype == of_k.dtype == torch.int32
        self.heads, self.of_q, self.of_k, self.dtype = (heads, kv_heads, dim, head_dim_vo), of_q, of_k, q_data_type
        self.given = causal, window_left, logits_soft_cap

    def run(self, q, k, v):
        assert (q.shape[1], k.shape[1], q.shape[2], v.shape[2]) == self.heads
        assert q.dtype == self.dtype
        assert (len(q), len(k)) == (int(self.of_q[-1]), int(self.of_k[-1]))
        ends = zip(self.of_q.tolist(), self.of_k.tolist(), strict=True)
        parts, (q0, k0) = [], next(ends)
        for q1, k1 in ends:
            parts.append(self.library.attend(q[q0:q1], k[k0:k1], v[k0:k1], *self.given))
            q0, k0 = q1, k1
        return torch.cat(parts)


SHORT = {**SHAPE, "dtype": "bf16", "seqlen_q": 20, "seqlen_k": 31}
FLASHINFER = [
    *map(half, MASK_ROWS[:4]),
    rows.of_problem(Problem(**SHORT)),
    rows.of_problem(Problem(**SHORT, batch=3, head_dim_v=32, mask="causal", softcap=True)),
    rows.of_problem(Problem(**SHORT, mask="causal", softcap=True)),
    rows.of_problem(Problem(**SHORT, batch=2, mask="window", window_left=3, window_right=0)),
]


@pytest.mark.parametrize("row", FLASHINFER, ids=lambda row: row.name)
def test_flashinfer_is_asked_for_the_same(row):
    library, inputs = FakeFlashInfer(), rows.make_inputs(row, "cpu")
    serve = flash.through_flashinfer(library)(row, inputs)
    for _ in range(2):
        verdict, _ = run.verified(serve(inputs), inputs.call, 1 << 30)
        assert verdict, verdict.message
    alone = row.problem.batch == 1 and not row.documents
    assert (library.plans, library.singles, library.layouts) == ((0, 2, {"NHD"}) if alone else (1, 0, {"NHD"}))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (half(MASK_ROWS[4]), "no such mask"), (CAUSAL, "no fp32"), (half(ALIBI), "no ALiBi"),
        (rows.of_problem(Problem(**SHORT, mask="window", window_left=3, window_right=2)), "right of the diagonal"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)  # fmt: skip
def test_flashinfer_says_what_it_cannot(row, says):
    with pytest.raises(Cannot, match=says):
        flash.through_flashinfer(FakeFlashInfer())(row, rows.make_inputs(row, "cpu"))


def test_ffpa_is_asked_above_head_dim_256(monkeypatch):
    _, absent = peers.load(["ffpa"], "cuda", {})
    assert absent["ffpa"].endswith("pip install ffpa-attn")
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setitem(sys.modules, "ffpa_attn", types.SimpleNamespace(ffpa_attn_func=attend))
    here, absent = peers.load(["ffpa"], "cuda", {})
    assert (list(here), absent) == (["ffpa"], {})
    row = rows.of_problem(Problem(dtype="bf16", head_dim=264, mask="causal", heads=2, kv_heads=1, seqlen_q=24))
    inputs = rows.make_inputs(row, "cpu")
    verdict, _ = run.verified(here["ffpa"].prepare(row, inputs)(inputs), inputs.call, 1 << 30)
    assert verdict, verdict.message
    for dims, says in (((256, 256), "calls SDPA"), ((576, 512), "one for both")):
        other = rows.of_problem(Problem(dtype="bf16", head_dim=dims[0], head_dim_v=dims[1], seqlen_q=24))
        with pytest.raises(Cannot, match=says):
            here["ffpa"].prepare(other, inputs)


def test_flashinfer_is_found_by_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", FakeFlashInfer())
    here, absent = peers.load(["flashinfer"], "cuda", {})
    assert (list(here), absent) == (["flashinfer"], {})


@pytest.mark.parametrize(
    "problem",
    [Problem(mask="window", window_left=3), Problem(softcap=True), Problem(mask="causal", seqlen_q=4, seqlen_k=8)],
    ids=str,
)
def test_sdpa_says_what_it_cannot(problem):
    with pytest.raises(Cannot):
        sdpa.sdpa({}).by_op["forward"](rows.of_problem(problem), {})


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_with_dropout_ours_is_verified_and_peers_are_not_asked(op: str) -> None:
    problem = ops.get(op).problem(dtype="fp32", head_dim=16, seqlen_q=40, heads=2, dropout=True)
    row, inputs = rows.of_problem(problem), ops.get(op).calls().inputs(problem, "cpu", 0, False)
    outputs = by_op.get(row.op).ours(row, inputs)(inputs)
    names = ops.get(op).calls().timed
    given = dict(zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
    verdict = ops.get(op).calls().check(inputs.call, given)
    assert verdict, verdict.message
    here, _ = peers.load(["sdpa"], "cpu", {}, op)
    with pytest.raises(Cannot, match="drops weights of its own choice"):
        here["sdpa"].prepare(row, inputs)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch):
    """Peers of one's own: wrong, failing, and unable to do causal rows."""

    def wrong(row, inputs):
        return lambda i: by_sdpa(i.call.q, i.call.k, i.call.v, row.causal) * 1.01

    def failing(row, inputs):
        raise ValueError("no such kernel\nat all")

    def picky(row, inputs):
        if row.causal:
            raise Cannot("no causal")
        return lambda i: by_sdpa(i.call.q, i.call.k, i.call.v, False)

    planted = types.ModuleType("planted")
    for function in (wrong, failing, picky):
        monkeypatch.setattr(
            planted, function.__name__, lambda paths, f=function: Loaded({"forward": f}, "0.1"), raising=False
        )
        peer = Peer(function.__name__, ("cpu",), f"planted:{function.__name__}")
        monkeypatch.setitem(peers.PEERS, function.__name__, peer)
    monkeypatch.setitem(sys.modules, "planted", planted)


def near_the_limit(row: dict, limit: dict) -> None:
    """The share is of the slower of what the FLOPs and the bytes take at the machine's rates."""
    least = {"compute": row["flops"] / limit["tflops"] / 1e12, "memory": row["bytes"] / limit["gbps"] / 1e9}
    assert row["bound"] == max(least, key=least.get)
    facts = row["participants"]["fagen"]
    assert facts["share"] == pytest.approx(max(least.values()) / facts["seconds"])


@pytest.mark.slow
@needs_cxx
def test_a_run_end_to_end(tmp_path, capsys, planted):
    files = {name: tmp_path / f"result.{name}" for name in ("json", "markdown", "csv")}
    words = [*TINY, *QUICK, "--peers", "sdpa,math,wrong,failing,picky,fa4", "--host", "--json"]
    words += ["--out", str(files["json"]), "--markdown", str(files["markdown"]), "--csv", str(files["csv"])]
    assert main.main(["bench", *words]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result == json.loads(files["json"].read_text())
    assert result["complete"]
    assert [sample["when"] for sample in result["limit"]["samples"]] == ["start", "middle", "end"]
    assert result["environment"]["torch"] == torch.__version__
    assert result["peers"]["fa4"] == {"version": "", "absent": "it needs a GPU"}
    assert err.count("absent: fa4: it needs a GPU") == 2, "before the rows, and below the table"
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        found, causal = row["participants"], row["problem"]["mask"] == "causal"
        assert {name: facts["outcome"] for name, facts in found.items()} == {
            "fagen": "ok", "sdpa": "ok", "math": "ok", "wrong": "wrong", "failing": "failed",
            "picky": "cannot" if causal else "ok",
        }  # fmt: skip
        assert found["failing"]["reason"] == "ValueError: no such kernel"
        assert found["wrong"]["error_over_bound"] > 1
        assert "seconds" not in found["wrong"], "what is wrong is not timed"
        assert found["fagen"]["tflops"] == pytest.approx(row["flops"] / found["fagen"]["seconds"] / 1e12)
        assert found["fagen"]["gbps"] == pytest.approx(row["bytes"] / found["fagen"]["seconds"] / 1e9)
        near_the_limit(row, result["limit"])
        best = max((n for n in found if "tflops" in found[n] and n != OURS), key=lambda n: found[n]["tflops"])
        assert row["best_peer"] == best
        assert row["ratio"] == pytest.approx(found["fagen"]["tflops"] / found[best]["tflops"])
        assert row["choice"]["family"] == "cpu_forward"
        assert (row["choice"]["served_by"], row["choice"]["provenance"]) == ("kernel", "default")
    assert result["summary"]["rows"] == result["summary"]["compared"] == 4
    assert result["host"]["participants"]["fagen"]["microseconds"] > 0
    assert "geometric mean" in err
    assert "wrong: wrong on fp32/d16/none" in err
    text = files["markdown"].read_text()
    assert text.count("\n| fp32/d16/") == 4
    assert str(tmp_path) not in text + result["command"], "folders of this machine are nobody's business"
    table = list(csv.DictReader(files["csv"].open()))
    assert len(table) == 4 * 6
    assert {line["outcome"] for line in table} == {"ok", "wrong", "failed", "cannot"}

    slow, quick = tmp_path / "slow.json", tmp_path / "quick.json"
    for path, factor in ((slow, 1e-4), (quick, 1e4)):  # what ours was once; no load of the machine makes up for it
        old = json.loads(files["json"].read_text())
        for row in old["rows"]:
            row["participants"]["fagen"]["tflops"] *= factor
        path.write_text(json.dumps(old))
    again = ["bench", *TINY, *QUICK, "--peers", "sdpa", "--filter", "q24"]
    assert main.main([*again, "--compare", str(slow)]) == 0
    assert "no row fell" in capsys.readouterr().err
    assert main.main([*again, "--compare", str(quick), "--json"]) == 1
    out, err = capsys.readouterr()
    falls = json.loads(out)["regressions"]
    assert {(fall["row"], fall["what"]) for fall in falls} == {
        (f"fp32/d16/{mask}/b1/h4-2/q24-k24", what) for mask in ("none", "causal") for what in ("ratio", "tflops")
    }
    assert "slower: fp32/d16/none" in err
    assert "2 rows are in one result alone" in err


@needs_cxx
def test_a_run_that_is_cut_off_keeps_what_it_had(tmp_path, capsys, planted, monkeypatch):
    def synchronize(device):
        if any(row == "failing" for row in asked):
            raise RuntimeError("an illegal memory access was encountered")

    asked: list[str] = []
    alive = run.alive
    monkeypatch.setattr(run, "alive", lambda device, name, row: (asked.append(name), alive(device, name, row)))
    monkeypatch.setattr(run, "synchronize", synchronize)

    def late(row, inputs):
        return 1 / 0 if row.causal else lambda i: by_sdpa(i.call.q, i.call.k, i.call.v, False)

    monkeypatch.setattr(sys.modules["planted"], "failing", lambda paths: Loaded({"forward": late}))
    out = tmp_path / "result.json"
    assert main.main(["bench", *TINY, *QUICK, "--peers", "failing", "--out", str(out)]) == 1
    err = capsys.readouterr().err
    assert "failing left the GPU in an error state on fp32/d16/causal" in err
    result = json.loads(out.read_text())
    assert not result["complete"]
    assert [row["problem"]["mask"] for row in result["rows"]] == ["none", "none"]


@needs_cxx
def test_an_interrupted_run_shows_what_it_had(tmp_path, capsys, monkeypatch):
    one, seen = run.time_row, []

    def interrupted(*args):
        seen.append(1)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return one(*args)

    monkeypatch.setattr(run, "time_row", interrupted)
    files = [tmp_path / "x.json", tmp_path / "x.md"]
    words = ["--peers", "sdpa", "--out", str(files[0]), "--markdown", str(files[1]), "--compare", str(files[0])]
    files[0].write_text(json.dumps(made({"fagen": 1}) | {"device": target.host().device}))
    assert main.main(["bench", *TINY, *QUICK, *words]) == 130
    err = capsys.readouterr().err
    assert "interrupted after 1 of 4 rows" in err
    result = json.loads(files[0].read_text())
    assert (len(result["rows"]), result["complete"]) == (1, False)
    assert result["rows"][0]["name"] in files[1].read_text()


def test_an_interrupt_drops_what_has_not_begun():
    begun = []

    def job(n):
        begun.append(n)
        if n == 0:
            raise KeyboardInterrupt
        time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        prebuild.together(job, range(1000), 1)
    assert len(begun) < 1000


@needs_cxx
def test_ours_wrong_is_an_error(capsys, monkeypatch):
    def wrong(row, inputs):
        return lambda i: by_sdpa(i.call.q, i.call.k, i.call.v, True) * 1.1

    monkeypatch.setitem(by_op.OPS, "forward", dataclasses.replace(by_op.OPS["forward"], ours=wrong))
    words = [*TINY[:-6], "--seqlen", "24", "--heads", "2", *QUICK, "--json"]
    assert main.main(["bench", *words]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert len(result["summary"]["ours_not_ok"]) == 2
    assert result["rows"][0]["ratio"] is None
    assert "wrong: fagen on" in err


@needs_cxx
def test_no_peers_and_what_pytorch_computes_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(load, "average", lambda: 4.0 * load.cores())
    words = "--target cpu --dtype fp32 --head-dim 16 --seqlen 24 --heads 2 --peers none".split()
    assert main.main(["bench", *words, *QUICK, "--json"]) == 0
    said = capsys.readouterr()
    assert "note     this machine is busy (load " in said.err
    result = json.loads(said.out)
    assert result["rows"][0]["best_peer"] is None
    result["rows"][0]["choice"]["served_by"] = "torch"
    result["summary"] = run.summary(result["rows"])
    assert report.lines(result, result["rows"][0]["bound"])[1][1].endswith("*")
    assert any(text.startswith("* no kernel of ours") for text in report.closing(result))


@needs_cxx
def test_ours_held_to_a_family(capsys, monkeypatch):
    """What the registry's first family would serve is served by the one that is named."""
    words = "--target cpu --dtype fp32 --head-dim 16 --seqlen 24 --heads 2 --peers none --json".split()
    without = dataclasses.replace(by_op.OPS["forward"], ours=None, choice=None)  # dispatch has no say
    monkeypatch.setitem(by_op.OPS, "forward", without)
    assert main.main(["bench", *words, *QUICK, "--family", "cpu_forward"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["family"] == "cpu_forward"
    (row,) = result["rows"]
    assert (row["choice"]["family"], row["choice"]["provenance"]) == ("cpu_forward", "default")
    assert row["participants"]["fagen"]["outcome"] == "ok"
    assert main.main(["bench", *words, *QUICK, "--family", "sm80_forward"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["participants"]["fagen"] == {"outcome": "cannot", "reason": "needs a GPU"}
    assert main.main(["bench", *words, "--family", "nothing"]) == 2
    assert "known: cpu_few_rows, cpu_forward" in capsys.readouterr().err


def test_what_cannot_be_captured_is_told():
    def fails(inputs):
        raise ValueError("not in a capture")

    facts: dict = {}
    with pytest.raises(RuntimeError, match="not in a capture"):
        run._Shielded(fails, {}, facts)()
    result = made({"fagen": 600, "fa3": 590})
    result["rows"][0]["participants"]["fa3"] |= facts
    assert "timed eagerly: fa3 on 1 rows: ValueError: not in a capture" in report.closing(result)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--suite", "nothing"], "models"),
        (["--filter", "zzz"], "no row is left"),
        (["--filter", "("], "no regular expression"),
        (["--peers", "fa9"], "fa9"),
        (["--compare", "/nonexistent.json"], "/nonexistent.json"),
        (["--out", "/nonexistent/x.json"], "no folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(words, says, capsys):
    assert main.main(["bench", "--target", "cpu", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) <= 3


def test_a_target_that_is_not_here(capsys):
    if not torch.cuda.is_available():
        assert main.main(["bench", "--target", "sm_90"]) == 4
        assert "needs such a GPU" in capsys.readouterr().err


# ---- comparing and drawing ------------------------------------------------------------------------------------------


def made(speeds: dict[str, float], *, noise: float = 0.001, limits: tuple[float, ...] = (700.0, 700.0)) -> dict:
    """A result of the peers suite in which every participant has the same speed on all rows."""
    found = []
    for row in suites.suite("peers", GPU):
        participants = {
            name: {"outcome": "ok", "seconds": 1.0, "uncertainty": noise / 2**0.5 / 2, "tflops": tflops, "error": 0.0}
            for name, tflops in speeds.items()
        }
        found.append(
            {"name": row.name, "series": row.series, "length": row.problem.seqlen_q, "participants": participants,
             "bound": "compute", "key": row.problem.key, "flops": 1.0, "bytes": 1,
             "choice": {"served_by": "kernel"}, **run.compared(participants)}
        )  # fmt: skip
    return {
        "format": run.FORMAT, "device": "NVIDIA H200", "rows": found, "peers": {
            name: {"version": "", "absent": ""} for name in speeds if name != OURS
        }, "limit": {"what": "product", "samples": [{"tflops": t, "gbps": 6 * t} for t in limits],
        "tflops": limits[0], "gbps": 6 * limits[0]}, "environment": {}, "command": "fagen bench", "host": None,
        "summary": run.summary(found),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("new", "options", "falls"),
    [
        ({"fagen": 600, "fa3": 590}, {}, set()),
        ({"fagen": 595, "fa3": 585}, {}, set()),  # within 2 %
        ({"fagen": 550, "fa3": 590}, {}, {"tflops", "ratio"}),
        ({"fagen": 550, "fa3": 540}, {}, {"tflops"}),
        ({"fagen": 550, "fa3": 540}, {"limits": (640.0, 700.0)}, set()),  # the machine drifts as much
        ({"fagen": 550, "fa3": 590}, {"noise": 0.2}, set()),
        ({"fagen": 250, "fa3": 590}, {"noise": 2.0}, {"tflops", "ratio"}),  # no noise excuses that
        ({"fagen": 600, "fa3": 650}, {}, {"ratio"}),
        ({"fagen": 600, "fa3": 590, "fa4": 700}, {}, set()),  # a peer that the old one had not
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),  # a set has no order
)
def test_a_fall_is_more_than_the_noise(new, options, falls):
    found, lonely = compare.regressions(made(new, **options), made({"fagen": 600, "fa3": 590}))
    assert {fall["what"] for fall in found} == falls
    assert len(found) == 39 * len(falls)
    assert lonely == []


def test_rows_that_memory_bounds_are_in_gigabytes():
    result = made({"fagen": 600, "fa3": 590})
    result["rows"][1]["bound"] = "memory"
    for facts, gbps in zip(result["rows"][1]["participants"].values(), (3900.4, 3500.0), strict=True):
        facts["gbps"] = gbps
    text, name = report.table(result), result["rows"][1]["name"]
    assert text.index("GB/s, memory-bound") > text.index("TFLOP/s")
    assert len(report.lines(result, "memory")) == 2
    assert report.lines(result, "memory")[1][:3] == (name, "3900", "3500")
    assert f"| {name} | **3900** | 3500 |" in report.markdown(result)
    assert "copies, 4200, 4200 GB/s" in report.markdown(result)
    assert " GB/s  " in report.line(result["rows"][1], ["fagen"])


def test_means_with_and_without_rows_that_need_split_keys():
    result = made({"fagen": 600, "fa3": 500})
    for row, ratio in zip(result["rows"], (0.5, 0.9, 1.5, 1.5), strict=False):
        row["ratio"], row["needs_split_keys"] = ratio, ratio == 0.5
    del result["rows"][4:]
    summary = result["summary"] = run.summary(result["rows"])
    names = [row["name"] for row in result["rows"]]
    assert summary["geometric_mean"] == pytest.approx((0.5 * 0.9 * 1.5 * 1.5) ** 0.25)
    rest = summary["without_split_keys"]
    assert rest["geometric_mean"] == pytest.approx((0.9 * 1.5 * 1.5) ** (1 / 3))
    assert (rest["compared"], rest["worst"]["name"]) == (3, names[1])
    assert summary["behind"] == names[:2]
    text = "\n".join(report.closing(result))
    assert "over 4 rows" in text and "over 3 rows" in text
    assert f"behind: {names[0]}^ 0.500x (fa3), {names[1]} 0.900x (fa3); ^ few blocks" in text
    assert run.summary(result["rows"][1:])["without_split_keys"] is None


def test_figures_of_a_cpu_are_in_gflops_with_their_spread():
    result = made({"fagen": 0.0523, "sdpa": 0.0412}, limits=(0.0711, 0.0711)) | {"arch": "cpu"}
    for row in result["rows"]:
        for facts in row["participants"].values():
            facts["spread"] = 0.034
    result["rows"][0]["choice"]["served_by"] = "torch"
    head, first, second = report.lines(result, "compute")[:3]
    assert head[0] == "GFLOP/s" and first[1:3] == ("52.3 ±3%*", "41.2 ±3%") and second[1] == "52.3 ±3%"
    assert " GFLOP/s" in report.line(result["rows"][0], ["fagen"], cpu=True)
    assert report.rates(result["limit"]["samples"][0], cpu=True).startswith("71.1 GFLOP/s")
    text = report.markdown(result)
    assert "**52.3 ±3%** | 41.2 ±3% |" in text and "71.1, 71.1 GFLOP/s" in text and "TFLOP/s" not in text


def test_a_fall_of_a_row_that_memory_bounds_is_measured_by_copies():
    new, old = made({"fagen": 550}), made({"fagen": 600})
    for row in new["rows"]:
        row["bound"] = "memory"
    assert len(compare.regressions(new, old)[0]) == 39
    new["limit"]["samples"][0]["gbps"] *= 0.8  # copies drifted as much, products did not
    assert compare.regressions(new, old)[0] == []
    for sample in old["limit"]["samples"]:  # of a version that did not measure them
        del sample["gbps"]
    assert compare.regressions(new, old)[0] == []


@pytest.mark.parametrize(
    ("problem", "keys"),
    [
        (Problem(seqlen_q=64, seqlen_k=256), 256),
        (Problem(seqlen_q=64, seqlen_k=256, mask="causal"), 256),
        (Problem(seqlen_q=1, seqlen_k=256, mask="window", window_left=15, window_right=0), 16),
        (Problem(seqlen_q=8, seqlen_k=256, mask="window", window_left=15, window_right=0), 23),
        (Problem(seqlen_q=256, mask="window", window_left=15, window_right=0), 256),
        (Problem(seqlen_q=300, seqlen_k=256, mask="window", window_left=0, window_right=0), 256),
    ],
    ids=str,
)
def test_what_must_be_moved(problem, keys):
    p = problem.replace(heads=4, kv_heads=2, head_dim=64, head_dim_v=32, batch=3)
    seen = masks.dense(p.seqlen_q, p.seqlen_k, window=(p.window_left, p.window_right))
    assert int(seen[0, 0].any(0).sum()) == keys
    want = 2 * 3 * 96 * (4 * p.seqlen_q + 2 * keys)
    assert rows.least_bytes(rows.of_problem(p)) == want


def test_what_was_right_once(tmp_path):
    old, new = made({"fagen": 600, "fa3": 590}), made({"fagen": 600, "fa3": 590})
    new["rows"][3]["participants"]["fagen"] = {"outcome": "wrong"}
    ((fall,), _) = compare.regressions(new, old)
    assert (fall["row"], fall["what"], fall["new"]) == (old["rows"][3]["name"], "outcome", "wrong")
    assert compare.regressions(old, new)[0] == []
    with pytest.raises(UsageError, match="another device"):
        compare.require_same(old, "NVIDIA A100")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UsageError, match="not of this format"):
        compare.read(tmp_path / "x.json")


def test_the_plot_has_a_panel_a_series(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib to draw with (pip install matplotlib)")
    result = made({"fagen": 600, "fa3": 590, "cudnn": 500})
    del result["rows"][0]["participants"]["fa3"]["tflops"]
    plot.draw(result, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text()
    for row in result["rows"]:
        assert f">{row['series']}<" in text
    assert ">fa3<" in text


def test_steps_of_decoding_have_a_panel_a_kind_of_cache(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib to draw with (pip install matplotlib)")
    names = ["decode b1 h8 d64 k512", "decode b2 h8 d64 k512", "decode page16 b1 h8 d64 k512",
             "decode page16 b2 h8 d64 k512", "decode mqa b2 h8 d64 k512", "ragged page16 b2 h8 d64 k512"]  # fmt: skip
    rows = [{"name": name, "participants": {"fagen": {"gbps": 100.0, "tflops": 1.0}}} for name in names]
    kinds = plot._kinds(rows)
    assert {kind: [row["series"] for row in found] for kind, found in kinds.items()} == {
        "contiguous": ["b1 h8 d64 k512", "b2 h8 d64 k512"],
        "page16": ["b1 h8 d64 k512", "b2 h8 d64 k512"],
        "others": ["mqa b2 h8 d64 k512", "ragged page16 b2 h8 d64 k512"],
    }
    result = {"op": "decode", "device": "a card", "rows": rows, "peers": {}, "limit": {"read_gbps": 150.0}}
    plot.draw(result, tmp_path / "decode.svg")
    text = (tmp_path / "decode.svg").read_text()
    assert all(kind in text for kind in kinds) and "GB/s" in text


def test_the_plot_needs_matplotlib(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert main.main(["bench", "--target", "cpu", "--plot", "x.svg"]) == 4
    assert "pip install matplotlib" in capsys.readouterr().err
