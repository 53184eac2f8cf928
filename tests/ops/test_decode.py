"""The decode op: its problem, its calls, and the reference against loops that read one key at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from fagen import ops
from fagen.cli import arguments
from fagen.errors import FagenError, InvalidArgument
from fagen.ops import problem_from
from fagen.ops.attention import decode_inputs, decode_reference
from fagen.ops.attention.decode_call import DecodeCall
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.target import host

CALLS = ops.get("decode").calls()
PROBLEMS = [
    DecodeProblem(dtype="fp32", head_dim=16, head_dim_v=8, seqlen_k=70),
    DecodeProblem(dtype="fp32", head_dim=16, mask="causal", kv_dtype="fp8_e4m3", page=1, seqlen_q=2, seqlen_k=70),
    DecodeProblem(dtype="fp32", head_dim=16, mask="window", window_left=9, sinks=True, softcap=True, page=16),
    DecodeProblem(dtype="fp32", head_dim=16, mask="causal", aligned=False, sinks=True, page=64, heads=4, kv_heads=2),
]


def _key(call: DecodeCall, b: int, key: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    if call.page_table is not None:
        page, at = int(call.page_table[b, key // call.page]), key % call.page
    else:
        page, at = b if call.cache_batch_idx is None else int(call.cache_batch_idx[b]), key
    k, v = call.k[page, at, head].double(), call.v[page, at, head].double()
    if call.k_scale is not None and call.v_scale is not None:
        k, v = k * call.k_scale[b, head].double(), v * call.v_scale[b, head].double()
    return k, v


def _one_row(call: DecodeCall, q: torch.Tensor, b: int, h: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row that stands at key `at`."""
    (left, right), length = call.window, int(call.seqlens_k[b])
    first, last = (0 if left < 0 else at - left), (length - 1 if right < 0 else at + right)
    scores, values = [], []
    for key in range(max(0, first), min(length - 1, last) + 1):
        k, v = _key(call, b, key, h // (call.heads // call.kv_heads))
        score = q @ k / math.sqrt(len(k))
        scores.append(call.softcap * torch.tanh(score / call.softcap) if call.softcap else score)
        values.append(v)
    if call.sinks is not None:
        scores.append(call.sinks[h].double())
        values.append(torch.zeros(call.v.shape[3], dtype=torch.float64))
    if not scores:
        return torch.zeros(call.v.shape[3]), torch.tensor(-math.inf)
    lse = torch.stack(scores).logsumexp(0)
    return (torch.stack(scores) - lse).exp() @ torch.stack(values), lse


def by_loops(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = (torch.empty(shape, dtype=torch.float64) for shape, _ in call.output_types().values())
    for b in range(call.batch):
        starts, length = call.cu_seqlens_q, int(call.seqlens_k[b])
        first, end = (0, call.seqlen_q) if starts is None else (int(starts[b]), int(starts[b + 1]))
        for row in range(first, end):
            for h in range(call.heads):
                q = (call.q[b] if starts is None else call.q)[row, h].double()
                made = _one_row(call, q, b, h, length - (end - first) + row - first)
                where = (b, row, h) if starts is None else (row, h)
                out[where], lse[(b, h, row) if starts is None else (h, row)] = made
    return out, lse


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.static_key)
def test_the_reference_is_attention_on_the_cache(problem: DecodeProblem) -> None:
    kinds = set()
    for small in CALLS.check_problems(problem, host())[:5]:
        made = CALLS.inputs(small.replace(seqlen_k=min(small.seqlen_k, 90)), "cpu", 1, True)
        kinds.add(made.call.ragged)
        made.call.check_tensors()
        CALLS.require(problem, made.call, made.outputs)
        out, lse = by_loops(made.call)
        mine, mine_lse = decode_reference.attend(made.call, torch.float64)
        assert (mine - out).abs().max() < 1e-12 and torch.allclose(mine_lse, lse, rtol=1e-12)
        made.outputs["out"].copy_(out), made.outputs["lse"].copy_(lse)
        for check in (CALLS.check, CALLS.check_sample):
            verdict = check(made.call, made.outputs)
            assert verdict and verdict.ratio < 0.5
    assert kinds == {True, False}


def test_wrong_outputs_do_not_pass() -> None:
    problem = PROBLEMS[3].replace(batch=5, seqlen_q=3, seqlen_k=90)
    made = CALLS.inputs(problem, "cpu", 1, True)
    out, lse = decode_reference.attend(made.call, torch.float64)
    made.outputs["out"].copy_(out), made.outputs["lse"].copy_(lse)
    assert CALLS.check(made.call, made.outputs)
    for name, row in (("out", 2), ("out", out.shape[0] - 1), ("lse", 0), ("lse", 3)):
        was = made.outputs[name].clone()
        made.outputs[name][row] += 1e-3
        assert not CALLS.check(made.call, made.outputs)
        made.outputs[name][row] = math.nan
        assert not CALLS.check(made.call, made.outputs)
        made.outputs[name].copy_(was)
    one_key_less = dataclasses.replace(made.call, seqlens_k=(made.call.seqlens_k - 1).clamp(min=0))
    assert not CALLS.check(one_key_less, made.outputs)


def test_a_sample_covers_the_last_head() -> None:
    made = CALLS.inputs(PROBLEMS[2].replace(batch=3, heads=4, kv_heads=2), "cpu", 1, False)
    out, lse = decode_reference.attend(made.call, torch.float64)
    made.outputs["out"].copy_(out), made.outputs["lse"].copy_(lse)
    assert CALLS.check_sample(made.call, made.outputs)
    made.outputs["out"][2, 0, 3, 5] += 1e-3
    verdict = CALLS.check_sample(made.call, made.outputs)
    assert not verdict and "sequence 2 kv head 1" in verdict.message


@pytest.mark.parametrize("page", [0, 1, 16, 256])
def test_inputs_poison_what_no_sequence_has(page: int) -> None:
    problem = DecodeProblem(dtype="bf16", head_dim=16, page=page, batch=20, heads=2, seqlen_k=300)
    call = CALLS.inputs(problem, "cpu", 1, True).call
    lengths, own = call.seqlens_k.tolist(), 0
    assert {300, *decode_inputs.edges(problem)} <= set(lengths)
    for b, length in enumerate(lengths):
        for key in range(length):
            assert not _key(call, b, key, 0)[0].isnan().any()
            own += 1
    assert int((~call.k.isnan().any(-1).any(-1)).sum()) == own  # all others are NaN
    if page:
        used = [-(-length // page) for length in lengths]
        assert call.page_table is not None and call.k.shape[0] > sum(used)
        assert all(entry > call.k.shape[0] for b, count in enumerate(used) for entry in call.page_table[b, count:])


def test_keys_and_dicts() -> None:
    p = DecodeProblem(mask="causal", page=16, kv_dtype="fp8_e4m3", sinks=True, softcap=True, heads=8, seqlen_q=2)
    assert p.static_key == "decode/bf16/d128/causal/softcap/kv-fp8_e4m3/sinks/page16"
    assert p.size_key == "b1/h8-8/q2-k1024"
    assert problem_from(p.to_dict()) == p and "alibi" not in p.to_dict()
    assert DecodeProblem(head_dim=576, head_dim_v=512).static_key == "decode/bf16/d576-512/none"
    for words in ({"page": 5}, {"kv_dtype": "int8"}, {"alibi": True}, {"dropout": True}, {"head_dim": 577}):
        with pytest.raises(InvalidArgument):
            DecodeProblem(**words)
    with pytest.raises(InvalidArgument):
        DecodeProblem(mask="intervals", intervals="both4")


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"k": torch.zeros(3, 70, 2, 16)}, "the same pages"),
    ({"v": torch.zeros(3, 70, 2, 16, dtype=torch.bfloat16)}, "dtype of q"),
    ({"q": torch.zeros(4, 1, 2, 16)}, "seqlens_k has 3 sequences"),
    ({"q": torch.zeros(3, 1, 3, 16)}, "must divide"),
    ({"seqlens_k": torch.zeros(3, dtype=torch.int64)}, "seqlens_k must be int32"),
    ({"page_table": torch.zeros(3, 2, dtype=torch.int32)}, "pages of 70 rows"),
    ({"cache_batch_idx": torch.zeros(2, dtype=torch.int32)}, "cache_batch_idx must be int32 (3,)"),
    ({"most_keys": 71}, "room for 70"),
    ({"seqlens_k": torch.ones(6, dtype=torch.int32)[::2]}, "seqlens_k must be contiguous"),
    ({"sinks": torch.zeros(2, dtype=torch.bfloat16)}, "sinks must be float32"),
    ({"k_scale": torch.zeros(3)}, "k_scale must be float32 (3, 2)"),
    ({"num_splits": 1 << 30}, "num_splits"),
    ({"cu_seqlens_q": torch.zeros(4, dtype=torch.int32), "q": torch.zeros(3, 2, 16)}, "most_rows=0"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_calls_that_contradict_themselves_are_refused(change: dict[str, Any], message: str) -> None:
    good = DecodeCall(
        torch.zeros(3, 1, 2, 16), torch.zeros(3, 70, 2, 16), torch.zeros(3, 70, 2, 16), torch.ones(3, dtype=torch.int32)
    )
    good.check_tensors()
    if "k" in change:
        change = {"k": change["k"], "v": torch.zeros(3, 71, 2, 16)}
    with pytest.raises(InvalidArgument) as raised:
        validate(dataclasses.replace(good, **change))
    assert message in str(raised.value)


def validate(call: DecodeCall) -> None:
    call.check_arguments()
    call.check_tensors()


def test_the_command_line_spells_every_problem() -> None:
    problems = [
        DecodeProblem(),
        DecodeProblem(dtype="fp16", page=16, kv_dtype="fp8_e4m3", sinks=True, softcap=True, mask="causal", seqlen_q=4),
        DecodeProblem(mask="window", window_left=9, window_right=0, seqlen_q=64, seqlen_k=64, aligned=False),
        DecodeProblem(head_dim=576, head_dim_v=512, heads=128, kv_heads=1, page=64, batch=7),
        DecodeProblem(head_dim=576, head_dim_v=512, shared_kv=True),
    ]
    for problem in problems:
        words, settings = ops.get("decode").flags(problem), {}
        while words:
            name = words.pop(0).removeprefix("--").replace("-", "_")
            name, equals, value = name.partition("=")
            value = value if equals else words.pop(0) if words and not words[0].startswith("--") else True
            settings[name] = value
        assert arguments.expand(settings) == [problem]
    (plain,) = arguments.expand({"op": "decode", "seqlen": "4k"})
    assert (plain.seqlen_q, plain.seqlen_k) == (1, 4096)
    for settings in (
        {"page": 16},
        {"sinks": True},
        {"shared_kv": True},
        {"kv_dtype": "fp8_e4m3"},
        {"op": "decode", "page": 7},
    ):
        with pytest.raises(FagenError):
            arguments.expand(settings)
