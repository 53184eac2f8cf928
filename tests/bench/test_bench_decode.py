"""fagen bench --op decode: its suite, who takes part, what a row says."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fagen import target
from fagen.bench import decode_peers, flash_mla, peers, report, rows, run, suites
from fagen.bench.peers import Cannot
from fagen.cli import main
from fagen.errors import UsageError
from fagen.ops.attention import decode_reference
from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.ops.attention.problem import Problem
from fagen.timing import machine

pytestmark = pytest.mark.usefixtures("quick_machine")

CPU, GPU = target.Target("cpu", "any", 2), target.known("sm_90")


def test_the_suites_have_rows_of_their_own() -> None:
    pages = {"decode": {0}, "paged": {1, 16, 64}, "ragged": {16, 64}, "mixed": {16, 64}, "mla": {0, 64}}
    for where in (CPU, GPU):
        for name, of_page in pages.items():
            found = suites.suite(name, where, op="decode")
            assert len({row.name for row in found}) == len(found) >= 2
            assert all(isinstance(row.problem, DecodeProblem) for row in found)
            assert {row.problem.page for row in found} == of_page
        found = suites.suite("decode", where, op="decode")
        assert any(row.problem.kv_dtype for row in found) and any(row.problem.seqlen_q > 1 for row in found)
        assert suites.default(where, "decode") == "decode"
    names = {row.name for row in suites.suite("decode", GPU, op="decode")}
    assert {"decode b16 h64/8 d64 k8192", "decode b32 h16/1 d256 k4096", "decode b1 h64/8 d128 k65536"} <= names
    paged = {row.name for row in suites.suite("paged", GPU, op="decode")}
    assert {name.replace("decode ", f"decode page{page} ") for name in names for page in (16, 64)} >= {
        name for name in paged if " page1 " not in name
    }
    with pytest.raises(UsageError, match="it has rows of decode"):
        suites.suite("decode", CPU)
    with pytest.raises(UsageError, match="for decode: --suite decode, paged"):
        suites.suite("peers", GPU, op="decode")
    for problem, op in ((Problem(), "decode"), (DecodeProblem(), "forward"), (DecodeProblem(), "backward")):
        with pytest.raises(UsageError, match="no problem of"):
            rows.as_op(problem, op)


def test_sequences_of_many_lengths() -> None:
    ragged, _ = suites.suite("ragged", GPU, op="decode")
    lengths = [keys for _, keys in ragged.steps]
    assert len(lengths) == 64 and min(lengths) >= 128 and max(lengths) == 65536 == ragged.problem.seqlen_k
    assert lengths == [keys for _, keys in suites.suite("ragged", GPU, op="decode")[1].steps], "seeded"
    assert all(6 <= sum(2**n <= keys < 2 ** (n + 1) for keys in lengths) <= 8 for n in range(7, 16)), "log-uniform"
    mixed, _ = suites.suite("mixed", GPU, op="decode")
    assert sorted(mixed.steps)[:60] == [(1, 4096)] * 60
    assert sorted(mixed.steps)[60:] == [(2048, 2048 * n) for n in (1, 2, 3, 4)]
    both = sum(p * (k - p) + p * (p + 1) / 2 for p, k in mixed.steps)
    assert rows.flops(mixed, None) == pytest.approx(4 * 128 * 32 * both, rel=1e-3)
    assert 64 * 4096 * 8 * 512 < rows.least_bytes(mixed) < 1.2 * 65 * 4096 * 8 * 512 + 2 * 8252 * 32 * 512


def test_the_machine_reads_on_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_COPY_BYTES", {"cpu": 1 << 22})
    monkeypatch.setattr(machine, "_SECONDS", 1e-3)
    reads = machine.Machine(CPU, reads=True)
    sample = reads.sample("start")
    assert reads.limits() == {name: sample[name] for name in ("tflops", "gbps", "read_gbps")}
    sample |= {"tflops": 1.0, "gbps": 5.0, "read_gbps": 10.0}
    assert reads.least_seconds(1.0, 1e9) == (0.1, "memory"), "what is read alone is bound by the rate of reads"
    copies = machine.Machine(CPU)
    copies.samples.append(sample)
    assert copies.least_seconds(1.0, 1e9) == (0.2, "memory")
    assert "10 GB/s read" in report.rates(sample | {"throttled": "power"}) and "power" not in report.rates(sample)
    assert "torch.sum reads 10 GB/s" in report.limit({"what": "x", "samples": [sample]})


# ---- peers ----------------------------------------------------------------------------------------------------------

FA3 = torch._C.parse_schema(
    "flash_attn_3::fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? cu_seqlens_q=None,"
    " Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None,"
    " Tensor? kv_batch_idx=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1,"
    " int window_size_right=-1, float softcap=0.0, Tensor? scheduler_metadata=None, int num_splits=0)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
FA3_PLAN = torch._C.parse_schema(
    "flash_attn_3::get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads,"
    " int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q=None,"
    " int? page_size=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,"
    " bool has_softcap=False, int num_splits=0) -> Tensor"
)
SMALL: dict[str, Any] = {"dtype": "bf16", "head_dim": 16, "heads": 8, "kv_heads": 2, "batch": 3, "seqlen_k": 48}
DECODED = [
    rows.Row("contiguous", DecodeProblem(**SMALL)),
    rows.Row("paged", DecodeProblem(**SMALL, page=16)),
    rows.Row("tokens", DecodeProblem(**SMALL, page=16, seqlen_q=3, mask="causal")),
    rows.Row("window", DecodeProblem(**SMALL, page=32, mask="window", window_left=9, window_right=0, softcap=True)),
    rows.Row("ragged", DecodeProblem(**SMALL, page=16), steps=((1, 7), (1, 48), (1, 16))),
    rows.Row("mixed", DecodeProblem(**SMALL, page=16, seqlen_q=9, mask="causal"), steps=((9, 20), (1, 48), (1, 1))),
]


class FakeFa3:
    """Takes what the real op takes, and answers as it does."""

    _schema = FA3

    def __init__(self) -> None:
        self.metadata: list[Any] = []

    def __call__(
        self, *, q: Any, k: Any, v: Any, seqused_k: Any, is_causal: bool, window_size_left: int, window_size_right: int,
        softmax_scale: float, num_splits: int, softcap: float = 0.0, page_table: Any = None, cu_seqlens_q: Any = None,
        max_seqlen_q: Any = None, kv_batch_idx: Any = None, scheduler_metadata: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert num_splits == 0 and (window_size_right == -1 or not is_causal)
        self.metadata.append(scheduler_metadata)
        right = 0 if is_causal else window_size_right
        call = DecodeCall(
            q, k, v, seqused_k, page_table, cu_seqlens_q, kv_batch_idx, window=(window_size_left, right),
            softcap=softcap, scale=softmax_scale, most_rows=max_seqlen_q or 0,
        )  # fmt: skip
        return decode_reference.attend(call, torch.float32)[0].to(q.dtype), None, None, None


class FakePlan:
    _schema = FA3_PLAN

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> torch.Tensor:
        self.calls.append(given)
        return torch.zeros(1)


class FakeFlashInfer:
    """Its two wrappers for paged caches, on (tokens, heads, dim), as its documentation describes them."""

    def __init__(self) -> None:
        self.made: list[tuple[str, Any]] = []
        self.plans = 0

    def BatchDecodeWithPagedKVCacheWrapper(self, workspace: Any, layout: str, *, use_tensor_cores: bool) -> Any:
        self.made.append(("decode", use_tensor_cores))
        return FakeWrapper(self, layout, decodes=True)

    def BatchPrefillWithPagedKVCacheWrapper(self, workspace: Any, layout: str) -> Any:
        self.made.append(("prefill", None))
        return FakeWrapper(self, layout, decodes=False)


class FakeWrapper:
    def __init__(self, library: FakeFlashInfer, layout: str, *, decodes: bool) -> None:
        assert layout == "NHD"
        self.library, self.decodes = library, decodes

    def plan(
        self, *words: Any, sm_scale: float, window_left: int, logits_soft_cap: float | None, q_data_type: Any,
        kv_data_type: Any, head_dim_vo: int = 16, causal: bool = False,
    ) -> None:  # fmt: skip
        self.library.plans += 1
        starts, (first, entries, last, heads, kv_heads, dim, page) = [], words[-7:]
        if not self.decodes:
            starts = [words[0]]
        assert len(words) == 7 + len(starts) and (heads, kv_heads, dim, head_dim_vo) == (8, 2, 16, 16)
        assert all(t.dtype == torch.int32 for t in (*starts, first, entries, last))
        assert q_data_type == kv_data_type == torch.bfloat16
        assert first[-1] == len(entries) and int(last.min()) >= 1 and int(last.max()) <= page
        counts = (first[1:] - first[:-1]).tolist()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for b, count in enumerate(counts):
            table[b, :count] = entries[int(first[b]) : int(first[b]) + count]
        self.starts, self.table = (starts or [None])[0], table
        self.lengths = torch.tensor([(n - 1) * page for n in counts], dtype=torch.int32) + last
        # a decoding wrapper has no causal mask: its one row is the last
        self.window, self.scale, self.cap = (window_left, 0 if causal else -1), sm_scale, logits_soft_cap or 0.0

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert q.dim() == 3
        starts = torch.arange(len(q) + 1, dtype=torch.int32) if self.starts is None else self.starts
        most = int((starts[1:] - starts[:-1]).max())
        call = DecodeCall(
            q, *cache, self.lengths, self.table, starts, window=self.window, scale=self.scale, softcap=self.cap,
            most_rows=most,
        )  # fmt: skip
        return decode_reference.attend(call, torch.float32)[0].to(q.dtype)


@pytest.mark.parametrize("row", DECODED, ids=lambda row: row.name)
def test_peers_are_asked_for_the_same(row: rows.Row) -> None:
    sets = [rows.make_inputs(row, "cpu", seed) for seed in (0, 1)]
    flashinfer, op, plan = FakeFlashInfer(), FakeFa3(), FakePlan()
    for prepare in (decode_peers.through_fa3(op, plan), decode_peers.through_flashinfer(flashinfer)):
        serve = prepare(row, sets[0])
        for inputs in (*sets, *sets):
            verdict, checked = run.verified(serve(inputs), inputs.call, 1 << 30)
            assert verdict and checked == "all", verdict.message
    assert flashinfer.plans == len(plan.calls) == 2, "once for each set of inputs"
    tokens = row.name in ("tokens", "mixed")
    assert flashinfer.made == [("prefill", None)] * 2 if tokens else [("decode", True)] * 2
    assert all(t is not None for t in op.metadata)
    assert plan.calls[0]["page_size"] == (row.problem.page or None)
    assert plan.calls[0]["max_seqlen_k"] == 48 or row.problem.page == 32


class FakeFlashMla:
    """Its two functions, as its documentation describes them; a later version plans in its first call."""

    def __init__(self) -> None:
        self.plans = 0

    def get_mla_metadata(self, lengths: torch.Tensor, rows_of_a_kv_head: int, kv_heads: int) -> tuple[Any, Any]:
        assert lengths.dtype == torch.int32 and kv_heads == 1
        self.plans, self.rows = self.plans + 1, rows_of_a_kv_head
        return "plan", "splits"

    def flash_mla_with_kvcache(
        self, q: Any, k_cache: Any, block_table: Any, cache_seqlens: Any, head_dim_v: int, plan: Any, splits: Any,
        softmax_scale: float, causal: bool, use_legacy: bool = False,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        assert (plan, splits) == ("plan", "splits") and use_legacy and self.rows == q.shape[1] * q.shape[2]
        call = DecodeCall(
            q, k_cache, k_cache[..., :head_dim_v], cache_seqlens, block_table, window=(-1, 0 if causal else -1),
            scale=softmax_scale,
        )  # fmt: skip
        return decode_reference.attend(call, torch.float32)[0].to(q.dtype), None


def test_flash_mla_on_a_latent_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    latent: dict[str, Any] = {**SMALL, "kv_heads": 1, "head_dim_v": 8, "shared_kv": True, "page": 64}
    for fields in ({}, {"seqlen_q": 2, "mask": "causal"}):
        row, library = rows.of_problem(DecodeProblem(**{**latent, **fields})), FakeFlashMla()
        sets = [rows.make_inputs(row, "cpu", seed) for seed in (0, 1)]
        serve = flash_mla.through(library)(row, sets[0])
        for inputs in (*sets, *sets):
            verdict, _ = run.verified(serve(inputs), inputs.call, 1 << 30)
            assert verdict, verdict.message
        assert library.plans == 2, "once for each set of inputs"
    for fields, says in (
        ({"page": 32}, "pages of 64"),
        ({"shared_kv": False}, "pages of 64"),
        ({"sinks": True}, "sinks"),
    ):
        row = rows.of_problem(DecodeProblem(**{**latent, **fields}))
        with pytest.raises(Cannot, match=says):
            flash_mla.through(FakeFlashMla())(row, rows.make_inputs(row, "cpu"))
    monkeypatch.setitem(sys.modules, "flash_mla", None)
    monkeypatch.setattr(flash_mla.importlib.util, "find_spec", lambda name: None)
    _, absent = peers.load(["flash_mla"], "cuda", {}, "decode")
    assert "pip install" in absent["flash_mla"]


def test_flash_attention_3_without_metadata() -> None:
    row, op = DECODED[0], FakeFa3()
    inputs = rows.make_inputs(row, "cpu")

    class Other(FakePlan):
        _schema = torch._C.parse_schema("flash_attn_3::get_scheduler_metadata(int number) -> Tensor")

    for plan in (None, Other()):
        decode_peers.through_fa3(op, plan)(row, inputs)(inputs)
    assert op.metadata == [None, None]


def test_peers_say_what_they_cannot() -> None:
    peer = {"fa3": decode_peers.through_fa3(FakeFa3()), "flashinfer": decode_peers.through_flashinfer(FakeFlashInfer())}
    cases = [
        ({"kv_dtype": "fp8_e4m3"}, "fp8", ("fa3", "flashinfer")),
        ({"sinks": True}, "sinks", ("fa3", "flashinfer")),
        ({"mask": "window", "window_left": 4, "window_right": 2, "seqlen_q": 3}, "right of the", ("flashinfer",)),
        ({"head_dim_v": 8}, "one head_dim", ("flashinfer",)),
        ({"seqlen_k": 40}, "whole pages", ("flashinfer",)),
    ]
    for fields, says, names in cases:
        row = rows.of_problem(DecodeProblem(**{**SMALL, **fields}))
        inputs = rows.make_inputs(row, "cpu")
        for name in names:
            with pytest.raises(Cannot, match=says):
                peer[name](row, inputs)(inputs)


def test_who_is_timed_on_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    here, absent = peers.load(["sdpa", "math"], "cpu", {}, "decode")
    assert set(here) == {"sdpa"} and absent["math"] == "it computes no decode here"
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    here, absent = peers.load(["fa2", "flashinfer", "fa4", "flex"], "cuda", {}, "decode")
    assert set(here) == {"fa2", "flashinfer"} and set(absent) == {"fa4", "flex"}


def test_sdpa_is_held_to_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    row, held = DECODED[0], []
    inputs = rows.make_inputs(row, "cpu")
    monkeypatch.setattr(
        torch.nn.attention, "sdpa_kernel", lambda backend: held.append(backend) or contextlib.nullcontext()
    )
    for backend in ("", "CUDNN_ATTENTION"):
        verdict, _ = run.verified(decode_peers.by_sdpa(backend)(row, inputs)(inputs), inputs.call, 1 << 30)
        assert verdict, verdict.message
    assert held == [torch.nn.attention.SDPBackend.CUDNN_ATTENTION]
    with pytest.raises(Cannot, match="paged"):
        decode_peers.by_sdpa("")(DECODED[1], rows.make_inputs(DECODED[1], "cpu"))


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = "--dtype fp32 --head-dim 16 --heads 4 --kv-heads 2 --batch 2 --seqlen 64 --page 0,16".split()
    words = ["bench", "--op", "decode", "--target", "cpu", *problem, "--rounds", "2", "--min-time", "0.001"]
    out = tmp_path / "result.json"
    assert main.main([*words, "--peers", "sdpa", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["op"], result["complete"]) == ("decode", True)
    limit = result["limit"]
    assert limit["read_gbps"] > 0
    contiguous, paged = result["rows"]
    for row in (contiguous, paged):
        assert row["participants"]["fagen"]["outcome"] == "ok" and row["choice"]["family"] == "cpu_decode"
        problem_of_row = DecodeProblem.from_dict(row["problem"])
        assert (row["length"], row["bytes"]) == (64, problem_of_row.bytes())
        assert row["flops"] == problem_of_row.flops()
    assert contiguous["participants"]["sdpa"]["outcome"] == "ok"
    assert paged["participants"]["sdpa"]["outcome"] == "cannot"
    for row in result["rows"]:
        if row["bound"] == "memory":
            least = row["bytes"] / limit["read_gbps"] / 1e9
            assert row["participants"]["fagen"]["share"] == pytest.approx(
                least / row["participants"]["fagen"]["seconds"]
            )
    capsys.readouterr()
