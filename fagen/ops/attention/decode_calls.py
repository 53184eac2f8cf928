"""Calls of the decode op: made, launched and checked."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fagen.errors import InvalidArgument
from fagen.ops import abi
from fagen.ops.attention import decode_inputs, decode_reference
from fagen.ops.attention.arguments import is_aligned
from fagen.ops.attention.decode_call import DecodeCall, Tensors
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.ops.base import Calls
from fagen.target import Target

if TYPE_CHECKING:
    Outputs = Mapping[str, torch.Tensor]

Params = abi.params("fagen/abi/decode.h")
_VERIFY_SEQLEN = {"cpu": 1024, "gpu": 8192}  # the most keys of the problem itself, made small
_VERIFY_HEADS, _VERIFY_ROWS = 8, 16


def make_params(call: DecodeCall, outputs: Outputs) -> ctypes.Structure:
    """The struct of the header; holds pointers, so the tensors must outlive it."""
    out, lse = outputs["out"], outputs.get("lse")
    params = sized_params(call, out.stride())
    set_addresses(params, call, out.data_ptr(), None if lse is None else lse.data_ptr())
    return params


def sized_params(call: DecodeCall, out: tuple[int, ...]) -> ctypes.Structure:
    """Sizes, settings and strides, those of the output as given; no address is set."""
    params: Any = Params()
    q, k, v, ragged = call.q, call.k, call.v, call.cu_seqlens_q is not None
    params.q.stride[:3] = (0, *q.stride()[:2]) if ragged else q.stride()[:3]
    params.o.stride[:3] = (0, *out[:2]) if ragged else out[:3]
    params.k.stride[:3], params.v.stride[:3] = k.stride()[:3], v.stride()[:3]
    if call.page_table is not None:
        params.page_table.stride[:2] = call.page_table.stride()
    if call.k_scale is not None:
        params.k_scale.stride[:2] = call.k_scale.stride()
    if call.v_scale is not None:
        params.v_scale.stride[:2] = call.v_scale.stride()
    rows, keys = call.seqlen_q, call.seqlen_k
    params.batch, params.heads, params.rows = call.batch, q.shape[-2], call.rows
    params.pages, params.page_size, params.kv_heads, params.head_dim = k.shape
    params.seqlen_q, params.seqlen_k, params.head_dim_v = rows, keys, v.shape[3]
    # a wider band shows no more, and its sum with a row would leave 32 bits
    left, right = call.window
    params.window_left, params.window_right = min(left, keys), min(right, rows)
    params.num_splits, params.softcap = call.num_splits, call.softcap
    params.scale = 1.0 / math.sqrt(params.head_dim) if call.scale is None else call.scale
    return params


def set_addresses(params: Any, tensors: Tensors | DecodeCall, out: int | None, lse: int | None) -> None:
    t = tensors
    params.q.data, params.k.data, params.v.data = t.q.data_ptr(), t.k.data_ptr(), t.v.data_ptr()
    params.o.data, params.lse = out, lse
    params.seqlens_k = t.seqlens_k.data_ptr()
    if t.page_table is not None:
        params.page_table.data = t.page_table.data_ptr()
    if t.cu_seqlens_q is not None:
        params.cu_seqlens_q = t.cu_seqlens_q.data_ptr()
    if t.cache_batch_idx is not None:
        params.cache_batch_idx = t.cache_batch_idx.data_ptr()
    if t.sinks is not None:
        params.sinks = t.sinks.data_ptr()
    if t.k_scale is not None:
        params.k_scale.data = t.k_scale.data_ptr()
    if t.v_scale is not None:
        params.v_scale.data = t.v_scale.data_ptr()


def require(problem: DecodeProblem, call: DecodeCall, outputs: Outputs) -> None:
    """A kernel of the problem serves the call and can write the outputs."""
    _want(not call.unreadable, call.unreadable)
    its = call.problem
    if its.static_key != problem.static_key:  # some kernels serve more than their own
        mask = "window" if problem.mask == "window" else its.mask
        shared = its.shared_kv and problem.shared_kv
        its = its.replace(mask=mask, aligned=its.aligned and problem.aligned, shared_kv=shared)
        have = f"the call is {call.problem.static_key}"
        _want(its.static_key == problem.static_key, f"the kernel is for {problem.static_key}", have)
    rows = "the kernel needs rows of whole 16-byte pieces"
    _want(not problem.aligned or is_aligned(outputs["out"]), "out is not aligned", rows)
    _want("lse" not in outputs or outputs["lse"].is_contiguous(), "lse must be contiguous")


def _want(good: bool, what: str, numbers: str = "") -> None:
    if not good:
        raise InvalidArgument(what, numbers)


def check_problems(problem: DecodeProblem, target: Target) -> list[DecodeProblem]:
    """One row and several, groups of all sizes, sequences whose lengths are at edges; then the problem itself.

    The batch and the most keys decide of what kind the splits are, and whether rows are packed: `decode_inputs.make`.
    """
    sizes = [(1, 1, 1), (8, 129, 1), (5, 302, 3), (11, 577, 1), (6, 200, 7), (3, 66, 40)]  # batch, keys, rows
    heads = [(2, 1), (8, 2), (3, 3), (16, 1), (5, 1), (12, 2)]
    bands = [(problem.window_left, problem.window_right), (17, 0), (40, 9), (100, -1), (0, 0), (33, 2)]
    found = []
    for index, (batch, keys, rows) in enumerate(sizes):
        q_heads, kv_heads = heads[index]
        left, right = bands[index] if problem.mask == "window" else bands[0]
        own = {"batch": batch, "heads": q_heads, "kv_heads": kv_heads, "seqlen_q": rows, "seqlen_k": keys}
        found.append(problem.replace(**own, window_left=left, window_right=right))
    most = _VERIFY_SEQLEN["gpu" if target.is_gpu else "cpu"]
    group = min(problem.heads // problem.kv_heads, _VERIFY_HEADS)
    lengths = {"seqlen_q": min(problem.seqlen_q, _VERIFY_ROWS), "seqlen_k": min(problem.seqlen_k, most)}
    return [*found, problem.replace(batch=1, heads=group, kv_heads=1, **lengths)]


def torch_peer(call: DecodeCall) -> tuple[Callable[[], object] | None, str]:
    """PyTorch's SDPA on the keys of a cache that is not paged, where all sequences have the same number of them."""
    lengths = call.seqlens_k.tolist()
    indexed = call.cache_batch_idx is not None and call.cache_batch_idx.tolist() != list(range(call.batch))
    if call.page or indexed or call.ragged or len(set(lengths)) > 1 or lengths[0] < 1:
        return None, "SDPA takes no paged cache, and no lengths"
    if call.sinks is not None or call.softcap or call.k.dtype != call.q.dtype or call.window[0] >= 0:
        return None, "SDPA has no sinks, softcap, fp8 or windows"
    if call.window[1] >= 0 and call.seqlen_q > 1:
        return None, "SDPA's causal mask is aligned elsewhere"
    q, k, v = (t[: call.batch].transpose(1, 2) for t in (call.q, call.k[:, : lengths[0]], call.v[:, : lengths[0]]))

    def run() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=call.scale, enable_gqa=True)

    return run, "SDPA"


CALLS = Calls(
    variants=(("out", "lse"), ("out",)),
    params=make_params,
    require=require,
    inputs=decode_inputs.make,
    check_problems=check_problems,
    check=lambda call, outputs: decode_reference.check(call, outputs),
    check_sample=lambda call, outputs: decode_reference.check_sample(call, outputs),
    torch_peer=torch_peer,
)
