"""From a call of decode to its result: the kernel that dispatch chooses, launched through ctypes, else PyTorch.

A decode step is short, so what Python does counts. All that follows from shapes, strides and settings is kept by them:
a call of a kind seen before fills in addresses and launches.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from fagen.dispatch import resolve
from fagen.notices import warn_fallback
from fagen.ops.attention import decode_checks, decode_reference
from fagen.ops.attention.arguments import ALIGNMENT
from fagen.ops.attention.decode_call import EMPTY, DecodeCall, Tensors
from fagen.ops.attention.decode_calls import Params, set_addresses, sized_params
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.runtime import decode_ops
from fagen.runtime.kernel import WORKSPACE_ALIGNMENT, launch_on_stream, selected

if TYPE_CHECKING:
    from fagen.dispatch.plan import Answer, Plan
    from fagen.runtime.kernel import Kernel

T = TypeVar("T")
PINNED_KEYS = 512  # of a split, with pinned numerics
_MOST_KINDS = 4096  # of calls that are kept


class StaticKind(NamedTuple):
    """What calls share that differ in sizes alone: the plan that says which kernel serves a size."""

    problem: DecodeProblem
    plan: Plan
    epoch: object


class Prepared(NamedTuple):
    """What all calls of a kind share. It holds until dispatch's answers change; unless `kept`, for one call alone."""

    kernel: Kernel
    params: ctypes.Structure  # no address in it is used
    workspace_bytes: int
    out: tuple[int, ...]  # shapes of the outputs
    lse: tuple[int, ...]
    epoch: object
    kept: bool
    static: StaticKind | None  # what it shares with calls of other sizes


_static_kinds: dict[tuple[Any, ...], StaticKind] = {}
_known: dict[tuple[Any, ...], Prepared] = {}  # calls of the op, by all but their addresses


def attend(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of the op. The call is validated, but for the contents of its tensors."""
    try:
        key = _all_facts(call)
    except (AttributeError, RuntimeError):  # no tensor, or not of strides: to be told in words
        call.check_tensors()
        raise
    prepared = _known.get(key)
    if prepared is None or prepared.epoch is not resolve.epoch():
        prepared = prepare(call)
        if prepared is not None and prepared.kept:
            keep(_known, key, prepared)
    return by_torch(call) if prepared is None else launch(prepared, call, want_lse=True)


def _all_facts(call: DecodeCall) -> tuple[Any, ...]:
    q, k, v = call.q, call.k, call.v
    tensors = (
        q, k, v, call.seqlens_k, call.page_table, call.cu_seqlens_q, call.cache_batch_idx, call.k_scale, call.v_scale,
        call.sinks,
    )  # fmt: skip
    return (
        *[None if t is None else (t.dtype, t.device, t.shape, t.stride()) for t in tensors],
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT, k.data_ptr() == v.data_ptr(), call.window,
        call.softcap, call.scale, call.num_splits, call.most_rows, call.most_keys,
    )  # fmt: skip


def prepare(call: DecodeCall) -> Prepared | None:
    """What serves a call; None where PyTorch computes, for now or for good.

    Checks and choices that depend on its static facts alone are done once.
    """
    try:
        facts = call.static_facts()
    except (AttributeError, IndexError, RuntimeError):  # no tensor, or not of strides: to be told in words
        call.check_tensors()
        raise
    epoch, static = resolve.epoch(), _static_kinds.get(facts)
    found = None if static is None else find_alike(static, call)
    if found is None or not found.known:
        call.check_arguments()
        call.check_tensors()
        found = _ask(call, facts)
        static = _static_kinds.get(facts)
    if found is None or found.kernel is None:
        return None
    return prepared(found, call, static, epoch)


def find_alike(static: StaticKind, call: DecodeCall) -> Answer | None:
    """What is known of a call of the kind; None where its sizes do not agree, or dispatch may choose otherwise."""
    if static.epoch is not resolve.epoch() or not call.sizes_agree():
        return None
    return static.plan.find(static.problem.resized(*_sizes(call)), ours=True)


def prepared(found: Answer, call: DecodeCall, static: StaticKind | None, epoch: object) -> Prepared:
    """A valid call that a kernel serves."""
    kernel, types = found.kernel, call.output_types()
    assert kernel is not None
    out, lse = types["out"][0], types["lse"][0]
    of_row = out[-2] * out[-1]
    params = sized_params(call, (*[out[1] * of_row] * (len(out) - 3), of_row, out[-1]))
    set_addresses(params, call, None, None)  # of the others the kernel may ask whether there are any
    with selected(call.q):  # a kernel may ask it for its SMs
        need = kernel.library.workspace_bytes(params)
    return Prepared(kernel, params, need, out, lse, epoch, found.known, static)


def keep(known: dict[tuple[Any, ...], T], key: tuple[Any, ...], value: T) -> None:
    if len(known) >= _MOST_KINDS:
        known.clear()
    known[key] = value


def _sizes(call: DecodeCall) -> tuple[int, int, int]:
    """With pinned splits the choice of a kernel may not depend on the other sequences either."""
    pinned = call.num_splits == -PINNED_KEYS
    return (1, 1, 8 * PINNED_KEYS) if pinned else (call.batch, call.seqlen_q, call.seqlen_k)


def _ask(call: DecodeCall, facts: tuple[Any, ...]) -> Answer | None:
    """Dispatch, about a valid call."""
    reason = call.unreadable
    target = None if reason else call.target
    if target is None:
        if reason != EMPTY:
            warn_fallback(reason or f"no kernels for device {call.q.device}")
        return None
    problem = call.problem.resized(*_sizes(call))
    with selected(call.q):  # where a stale kernel is verified
        found = resolve.answer(problem, target, ours=True)
    epoch, plan = resolve.epoch(), resolve.plan_of(problem, target)
    if plan is not None:
        keep(_static_kinds, facts, StaticKind(problem, plan, epoch))
    return found


def launch(
    prepared: Prepared, tensors: Tensors | DecodeCall, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A call of the kind, by its own tensors."""
    q = tensors.q
    out = q.new_empty(prepared.out)
    lse = q.new_empty(prepared.lse, dtype=torch.float32) if want_lse else None
    params: Any = Params.from_buffer_copy(prepared.params)  # other threads have their own
    set_addresses(params, tensors, out.data_ptr(), None if lse is None else lse.data_ptr())
    size = prepared.workspace_bytes
    if size:
        workspace = q.new_empty(size + WORKSPACE_ALIGNMENT, dtype=torch.uint8)
        params.workspace = -(-workspace.data_ptr() // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT
    status = launch_on_stream(prepared.kernel.library, params, q)
    if status:
        prepared.kernel.fail(status, tensors.inputs())
    return out, lse


def by_torch(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """In float32, as kernels compute."""
    if not call.q.is_cuda:
        decode_checks.check_contents(call)
    if not call.q.numel():
        made = call.new_outputs()
        return made["out"], made["lse"]
    dtype = call.q.dtype
    out, lse = decode_reference.attend(call, torch.float32 if dtype.itemsize < 4 else dtype)
    return out.to(dtype).contiguous(), lse.float().contiguous()


decode_ops.answer_with(attend)
