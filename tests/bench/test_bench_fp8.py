"""fagen bench --suite fp8: its rows, who takes part, and that all of them compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fagen import families, target
from fagen.bench import fp8, peers, rows, run, suites
from fagen.bench.peers import Absent, Cannot, Loaded
from fagen.ops.attention import fallback, fp8_calls
from fagen.ops.attention.fp8_problem import Fp8Problem

pytestmark = pytest.mark.usefixtures("quick_machine")
GPU = target.known("sm_90")
SMALL = rows.of_problem(Fp8Problem(head_dim=32, mask="causal", heads=2, kv_heads=1, seqlen_q=70))


class FakeOp:
    """FlashAttention 3's op: v as rows, a descale for each kv head."""

    _schema = torch._C.parse_schema(
        "flash_attn_3::fwd(Tensor q, Tensor k, Tensor v, Tensor? out=None, Tensor? q_descale=None, "
        "Tensor? k_descale=None, Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, "
        "int window_size_left=-1, int window_size_right=-1, float softcap=0.0, int num_splits=0) -> (Tensor, Tensor)"
    )

    def __init__(self, older: bool = False) -> None:
        self.values: list[int] = []
        if older:
            text = str(self._schema)
            for name in "qkv":
                text = text.replace(f"{name}_descale", f"descale_{name}")
            self._schema = torch._C.parse_schema(text)

    def __call__(self, q: Any, k: Any, v: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        given = {f"{n[-1]}_descale" if n.startswith("descale_") else n: value for n, value in given.items()}
        assert given["is_causal"] and v.shape == k.shape and v.dtype == torch.float8_e4m3fn
        self.values.append(v.data_ptr())
        call = fp8_calls.Fp8Call.of(
            q, k, v, descales=(given["q_descale"], given["k_descale"], given["v_descale"]), causal=True,
            scale=given["softmax_scale"],
        )  # fmt: skip
        out, lse = fallback.attend(call.dequantized())
        return out.bfloat16(), lse


def test_the_suite() -> None:
    found = suites.suite("fp8", GPU)
    assert len({row.name for row in found}) == len(found) == 36
    assert found == suites.suite("fp8", GPU, op="forward_fp8") and suites.default(GPU, "forward_fp8") == "fp8"
    for row in found:
        assert row.problem.batch * row.problem.seqlen_q == 16384 and row.op == "forward_fp8"
        assert [family.name for family in families.candidates(row.problem, GPU)[0]] == ["sm90_forward_fp8"]


def test_who_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peers.chosen("all", "cuda", "forward_fp8") == ["cudnn", "fa3", "fagen_16_bits", "fagen_quantizing"]
    here, absent = peers.load(["fagen_16_bits", "fagen_quantizing"], "cpu", {}, "forward_fp8")
    assert len(here) == 2 and not absent
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    _, absent = peers.load(["cudnn"], "cuda", {}, "forward_fp8")
    assert absent == {"cudnn": fp8.CUDNN}
    if not hasattr(torch.ops.flash_attn_3, "fwd"):
        assert "no op" in str(fp8.fa3())
        with pytest.raises(Absent):
            peers.PEERS["fa3"].load("cuda", {"fa3": Path("nowhere")})


def test_all_compute_the_same() -> None:
    """On a CPU ours is PyTorch on what the numbers stand for; the clock runs as on a GPU."""
    op = FakeOp()
    others = {"fa3": fp8.through_fa3(op), "older": fp8.through_fa3(FakeOp(older=True))}
    others |= {"16": _of(fp8.load_16_bits({})), "quantizing": _of(fp8.load_quantizing({}))}
    result = run.time_row(SMALL, {"fagen": fp8.ours, **others}, target.host(), run.Settings(rounds=2, min_seconds=0.0))
    told = {name: facts.get("reason", facts["outcome"]) for name, facts in result["participants"].items()}
    assert told == dict.fromkeys(("fagen", *others), "ok")
    assert len(set(op.values)) == 1, "rows of v are made once"
    blocks = SMALL.problem.replace(mask="intervals", intervals="both2", scale_block=64)
    del others["fa3"], others["older"]
    row = rows.of_problem(blocks)
    result = run.time_row(row, {"fagen": fp8.ours, **others}, target.host(), run.Settings(rounds=2, min_seconds=0.0))
    told = {name: facts.get("reason", facts["outcome"]) for name, facts in result["participants"].items()}
    assert told == dict.fromkeys(("fagen", *others), "ok")


def test_what_fa3_cannot_do() -> None:
    row = rows.of_problem(Fp8Problem(head_dim=32, dtype="fp16", seqlen_q=16))
    with pytest.raises(Cannot, match="bf16"):
        fp8.through_fa3(FakeOp())(row, rows.make_inputs(row, "cpu"))
    blocks = rows.of_problem(SMALL.problem.replace(scale_block=64))
    documents = rows.of_problem(SMALL.problem.replace(mask="intervals", intervals="lower2"))
    for row in (blocks, documents):
        with pytest.raises(Cannot, match="no intervals, and no scales of blocks"):
            fp8.through_fa3(FakeOp())(row, rows.make_inputs(row, "cpu"))
    op = FakeOp()
    op._schema = torch._C.parse_schema("flash_attn_3::fwd(Tensor q, Tensor k, Tensor v, bool is_causal) -> Tensor")
    with pytest.raises(Cannot, match="no argument k_descale"):
        fp8.through_fa3(op)(SMALL, rows.make_inputs(SMALL, "cpu"))


def _of(loaded: Loaded) -> peers.Prepare:
    prepare = loaded.by_op["forward_fp8"]
    assert not isinstance(prepare, str)
    return prepare
