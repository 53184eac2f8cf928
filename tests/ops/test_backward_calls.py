"""What the gradients are held to: autograd and the formula agree, a wrong gradient is found, inputs are guarded."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fagen import ops
from fagen.cli import arguments
from fagen.errors import InvalidArgument, UsageError
from fagen.ops.attention import gradients, reference
from fagen.ops.attention.backward import BackwardProblem
from fagen.ops.attention.backward_call import BackwardCall
from fagen.ops.attention.call import AttentionCall

PROBLEMS = [
    {"mask": "causal", "seqlen_q": 50, "seqlen_k": 30, "heads": 4, "kv_heads": 2},  # rows that see nothing
    {"mask": "window", "window_left": 7, "window_right": 2, "softcap": True, "seqlen_q": 70},
    {"mask": "intervals", "intervals": "both4", "alibi": True, "heads": 3, "kv_heads": 1, "seqlen_q": 66},
]


def inputs_of(varied: bool = True, **fields):
    problem = BackwardProblem(**{"dtype": "fp32", "head_dim": 16, "head_dim_v": 8, "batch": 2, "heads": 2, **fields})
    return ops.get("backward").calls().inputs(problem, "cpu", 1, varied)


@pytest.mark.parametrize("fields", PROBLEMS, ids=lambda p: p["mask"])
def test_autograd_and_the_formula_agree(fields):
    call = inputs_of(**fields).call
    exact, formula = gradients.gradients(call, torch.float64), gradients.from_lse(call, torch.float64)
    for name, want in exact.items():
        assert torch.allclose(formula[name], want, atol=2e-5, rtol=2e-5), name


def test_the_formula_of_some_rows_and_keys_is_a_part_of_the_whole():
    call = inputs_of(**PROBLEMS[2]).call
    whole = gradients.from_lse(call, torch.float64)
    of_rows = gradients.from_lse(call, torch.float64, rows=slice(20, 40))
    of_keys = gradients.from_lse(call, torch.float64, keys=slice(50, 66))
    assert torch.allclose(of_rows["dq"], whole["dq"][:, :, 20:40])
    assert torch.allclose(of_keys["dk"], whole["dk"][:, :, 50:])
    assert torch.allclose(of_keys["dv"], whole["dv"][:, :, 50:])


def test_blocks_of_rows_add_up(monkeypatch):
    call = inputs_of(seqlen_q=200, mask="causal").call
    whole = gradients.gradients(call, torch.float64)
    monkeypatch.setattr(reference, "_BYTES_A_STEP", 1)
    assert len(list(reference.row_blocks(call))) > 1
    assert all(torch.allclose(t, whole[name]) for name, t in gradients.gradients(call, torch.float64).items())


@pytest.mark.parametrize("check", [gradients.check, gradients.check_sample])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_gradient_is_found_and_a_right_one_passes(check, dtype):
    made = inputs_of(dtype=dtype, seqlen_q=130, mask="causal", heads=4, kv_heads=2)
    call = made.call
    for name, t in gradients.from_lse(call, torch.float32).items():
        made.outputs[name].copy_(call.of_bhsd(t))
    assert check(call, made.outputs)
    for name in made.outputs:
        damaged = {n: t.clone() for n, t in made.outputs.items()}
        damaged[name][0, 0] += 0.5
        verdict = check(call, damaged)
        assert not verdict
        assert name in verdict.message
        damaged[name][-1, -1, -1, -1] = math.nan
        assert not check(call, damaged)


def test_float32_gradients_may_be_off_by_one_rounding_of_the_lse():
    """Of a single key nothing else moves dv, and PyTorch's own error of it may be nearly nothing."""
    call = inputs_of(seqlen_q=1, seqlen_k=1, batch=1, heads=1, varied=False).call
    call = dataclasses.replace(
        call, q=torch.full_like(call.q, 4.0), k=torch.full_like(call.k, 4.0), lse=call.lse * 0 + 64
    )
    right = {name: call.of_bhsd(t).clone() for name, t in gradients.from_lse(call, torch.float32).items()}
    for ulps, fine in ((1, True), (40, False)):
        moved = {**right, "dv": right["dv"] * (1 + 64 * ulps * 2.0**-23)}
        assert bool(gradients.check(call, moved)) is fine


def test_inputs_are_what_forward_gave_and_what_is_written_is_guarded():
    made = inputs_of(**PROBLEMS[0], aligned=False)
    call, outputs = made.call, made.outputs
    assert call.problem == BackwardProblem(
        dtype="fp32", head_dim=16, head_dim_v=8, batch=2, aligned=False, **PROBLEMS[0]
    )
    forward = dataclasses.replace(call.forward, want_lse=True)
    assert reference.check(forward, {"out": call.o, "lse": call.lse})
    assert set(outputs) == {"dq", "dk", "dv"}
    assert not made.damage()
    call.lse[0, 0, -1] += 1
    assert "lse" in made.damage()
    whole = torch.as_strided(outputs["dk"], (1,), (1,), outputs["dk"].storage_offset() - 1)
    whole.zero_()
    assert "dk" in made.damage()


def test_a_call_keeps_what_forward_was_asked():
    q, k, v = torch.randn(1, 8, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 8)
    forward = dataclasses.replace(AttentionCall.of(q, k, v, causal=True, softcap=3.0), deterministic=True)
    o, lse = torch.randn(1, 8, 4, 8), torch.randn(1, 4, 8)
    call = BackwardCall.after(forward, o, lse, torch.randn_like(o))
    assert (call.window, call.softcap, call.layout) == ((-1, 0), 3.0, "bshd")
    assert call.problem.static_key == "backward/fp32/d16/causal/softcap/deterministic"
    assert {name: tuple(t.shape) for name, t in call.new_outputs().items()} == {
        "dq": (1, 8, 4, 16), "dk": (1, 9, 2, 16), "dv": (1, 9, 2, 8),
    }  # fmt: skip
    with pytest.raises(InvalidArgument, match="lse"):
        BackwardCall.after(forward, o, lse[..., :-1], o)
    with pytest.raises(InvalidArgument, match="dout"):
        BackwardCall.after(forward, o, lse, o.half())
    with pytest.raises(InvalidArgument, match="dlse"):
        BackwardCall.after(forward, o, lse, o, lse.double())


def test_torch_is_timed_by_its_backward_alone():
    call = inputs_of(varied=False, mask="causal", seqlen_q=40, head_dim_v=16).call
    peer, how = ops.get("backward").calls().torch_peer(call)
    assert how == "is_causal"
    assert peer is not None
    exact = gradients.gradients(call, torch.float64)
    for want, found in zip(exact.values(), peer(), strict=True):
        assert torch.allclose(call.of_bhsd(found).double(), want, atol=1e-4)
    assert ops.get("backward").calls().torch_peer(inputs_of(softcap=True).call)[0] is None


def test_the_command_line_names_a_backward_problem():
    (problem,) = arguments.expand({"op": "backward", "mask": "causal", "seqlen": 64, "deterministic": True})
    assert problem == BackwardProblem(mask="causal", seqlen_q=64, heads=16, deterministic=True)
    with pytest.raises(UsageError, match="deterministic"):
        arguments.expand({"deterministic": True})
    with pytest.raises(UsageError, match="op"):
        arguments.expand({"op": "sideways"})
    assert {p.op for p in arguments.expand({"op": "forward,backward"})} == {"forward", "backward"}
