"""Rows of attention and its gradients: ours as a user calls it, and checks of outputs too large for the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.bench import autograd, flash_arguments, rows
from fagen.bench import ours as kernels
from fagen.bench.peers import Loaded, Serve
from fagen.bench.rows import Inputs, Row
from fagen.ops.attention.problem import Problem
from fagen.target import Target

if TYPE_CHECKING:
    import torch

    from fagen.ops.attention.call import AttentionCall
    from fagen.ops.oracle import Verdict

    Outputs = Mapping[str, torch.Tensor]

_TILE_ROWS, _MANY_KEYS = 128, 512


def needs_split_keys(problem: Problem, target: Target) -> bool:
    """Whether fewer blocks of rows than SMs have many keys each: SMs are idle unless several share a block's keys."""
    p = problem
    blocks = -(-p.seqlen_q // _TILE_ROWS) * p.heads * p.batch
    keys = min(p.seqlen_k, p.window_left + _TILE_ROWS) if p.window_left >= 0 else p.seqlen_k
    return target.is_gpu and blocks < target.units and keys >= _MANY_KEYS


# ---- ours -----------------------------------------------------------------------------------------------------------


def options(row: Row, call: AttentionCall) -> dict[str, Any]:
    """The arguments of `fagen.attention` beside the tensors."""
    left, right = call.window
    return {
        "causal": row.causal,
        "window": (None if left < 0 else left, None if right < 0 or row.causal else right),
        "intervals": call.intervals,
        "softcap": call.softcap,
        "alibi_slopes": call.alibi_slopes,
    }


def ours(row: Row, inputs: Inputs) -> Serve:
    """`fagen.attention` as a user calls it, dispatch and all, but for `out`, which a graph replay needs to stay.

    With dropout the kernel itself, by the seed of the inputs, so that its output can be verified.
    """
    from fagen import api
    from fagen.ops.attention import fallback

    if row.problem.dropout:
        return kernels.dispatched(inputs.call, lambda i: fallback.attend(i.call)[0])
    if row.packed:
        return _varlen(row, inputs)
    given = options(row, inputs.call)
    return lambda i: api.attention(i.call.q, i.call.k, i.call.v, out=i.outputs["out"], **given)


def ours_eager(row: Row, inputs: Inputs) -> Serve:
    """The same with an output of its own, as the host time of a call counts it."""
    from fagen import api

    given = options(row, inputs.call)
    return lambda i: api.attention(i.call.q, i.call.k, i.call.v, **given)


def _varlen(row: Row, inputs: Inputs, **how: Any) -> Serve:
    """The function of packed sequences, which makes its bounds at every call."""
    from fagen.compat.varlen import flash_attn_varlen_func

    given = flash_arguments.document_arguments(row, inputs.call.q.device) | {"causal": row.causal} | how

    def serve(i: Inputs) -> torch.Tensor:
        q, k, v = flash_arguments.packed(i)
        out: Any = flash_attn_varlen_func(q, k, v, **given)
        return out.view_as(i.outputs["out"])

    return serve


def our_gradients(row: Row, inputs: Inputs) -> Serve:
    from fagen.ops.attention import fallback

    return kernels.dispatched(inputs.call, lambda i: fallback.gradients(i.call.forward, i.call.dout, None))


def _differentiable(row: Row, inputs: Inputs) -> Serve:
    """`fagen.attention` as a model that is trained calls it; which weights it drops, its generator decides."""
    from fagen import api
    from fagen.ops.attention.inputs import DROPOUT

    how = {"dropout_p": DROPOUT} if row.problem.dropout else {}
    if row.packed:
        return _varlen(row, inputs, **how)
    given = options(row, inputs.call) | how
    return lambda i: api.attention(i.call.q, i.call.k, i.call.v, **given)


def our_step(row: Row, inputs: Inputs) -> Serve:
    return autograd.steps(_differentiable)(row, inputs)


def load_plain(paths: Mapping[str, Path]) -> Loaded:
    """Ours once more, without dropout and in any order: what the one or the other costs."""
    return Loaded({"forward": ours, "backward": our_gradients, rows.TRAINING: our_step})


def choice(row: Row, inputs: Inputs) -> dict[str, Any]:
    """What dispatch picks for the row's call as `ours` makes it, and whether a kernel of ours really serves it."""
    from fagen import explanation
    from fagen.dispatch import attention
    from fagen.ops.attention.call import AttentionCall

    if row.problem.dropout or row.training:
        return kernels.choice(row, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the result
        tensors = inputs.call.q, inputs.call.k, inputs.call.v
        given = {**options(row, inputs.call), "out": inputs.outputs["out"]}
        kernel = attention.kernel_of(AttentionCall.of(*tensors, **given))
        return kernels.chosen(explanation.explain(*tensors, **given), kernel)


# ---- checked --------------------------------------------------------------------------------------------------------


def check_sample(call: Any, given: Outputs, cells: int) -> tuple[Verdict, str]:
    """The op's oracle on whole outputs, or its own sample where there are more scores than `cells`."""
    from fagen import ops

    calls = ops.get(call.problem.op).calls()
    if _planes(call) * _plane_cells(call) <= cells:
        return calls.check(call, given), "all"
    return calls.check_sample(call, given), "a sample of heads, rows and keys"


def check_heads(call: Any, given: Outputs, cells: int) -> tuple[Verdict, str]:
    """The oracle on whole outputs, or on evenly spread kv heads, each with the query heads that share it."""
    from fagen.ops.attention import reference

    group, planes, units, each = call.heads // call.kv_heads, call.kv_heads, _planes(call), _plane_cells(call)
    if units * each <= cells or units <= 2:
        return reference.check(call, given), "all"
    wanted = min(units, max(2, cells // each))
    picked = sorted({round(i * (units - 1) / (wanted - 1)) for i in range(wanted)})
    verdicts = []
    for b, kv in (divmod(unit, planes) for unit in picked):
        heads = slice(kv * group, (kv + 1) * group)
        verdicts.append(reference.check(*reference.part(call, given, b, heads)))
    worst = max(verdicts, key=lambda verdict: (not verdict.ok, verdict.ratio))
    error = max(verdict.error for verdict in verdicts)
    return reference.Verdict(worst.ok, error, worst.ratio, worst.message), f"{len(picked)} of {units} kv heads"


def _planes(call: Any) -> int:
    return int(call.batch * call.kv_heads)


def _plane_cells(call: Any) -> int:
    return int(call.heads // call.kv_heads * call.seqlen_q * call.seqlen_k)
