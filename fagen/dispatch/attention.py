"""From a call of attention to the kernel that serves it; the C++ op asks this, too."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fagen.dispatch import resolve
from fagen.dispatch.plan import TORCH, Answer
from fagen.ops.attention import fallback, traced
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.call import AttentionCall
from fagen.runtime import python_ops

if TYPE_CHECKING:
    from fagen.runtime.kernel import Kernel


def kernel_of(call: AttentionCall) -> Kernel | None:
    """The kernel for a call, built and loaded; None (and a warning) where PyTorch computes."""
    return answer_to(call, ours=call.want_lse).kernel


def answer_to(call: AttentionCall, *, ours: bool) -> Answer:
    """What serves a call: see `resolve.answer`."""
    if _refused(call):
        return TORCH
    assert call.target is not None
    with _on_device(call.q):
        return resolve.answer(call.problem, call.target, ours=ours)


def answer_to_gradients(call: AttentionCall) -> Answer:
    """What computes the gradients of a call. They are asked for before the call itself, whose kernel is built with
    theirs."""
    if _refused(call):
        return TORCH
    assert call.target is not None
    problem = BackwardProblem.of(call.problem, deterministic=call.deterministic)
    with _on_device(call.q):
        resolve.build_together(problem, call.problem, call.target)
        return resolve.answer(problem, call.target)


def build_ahead(call: AttentionCall, gradients: bool) -> None:
    """Begin to compile the kernel of a call that is traced, or the one of its gradients."""
    known = traced.described(call)
    target = None if known is None else known.target
    if known is None or target is None or known.unreadable:
        return
    problem = known.problem
    if gradients:
        problem = BackwardProblem.of(problem, deterministic=call.deterministic)
    resolve.build_ahead(problem, target)


def words_of(call: AttentionCall) -> list[int]:
    """The same for the C++ table: what serves this call, and the plan of its static key where there is one."""
    if _refused(call):
        return list(TORCH.words)
    problem, target = call.problem, call.target
    assert target is not None
    with _on_device(call.q):
        found = resolve.answer(problem, target, ours=call.want_lse)
    return [*found.words, *resolve.plan_words(problem, target, ours=call.want_lse)]


def backward_words_of(call: AttentionCall) -> list[int]:
    """The same for the gradients of a call."""
    if _refused(call):
        return list(TORCH.words)
    assert call.target is not None
    found, problem = answer_to_gradients(call), BackwardProblem.of(call.problem, deterministic=call.deterministic)
    return [*found.words, *resolve.plan_words(problem, call.target)]


def _refused(call: AttentionCall) -> bool:
    with torch.no_grad():  # whether gradients are needed was decided before
        reason = call.refusal
    if reason:
        fallback.warn(reason)
    return bool(reason)


def _on_device(q: torch.Tensor) -> Any:
    """Where a stale kernel is verified."""
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()


python_ops.answer_with(words_of, backward_words_of, build_ahead)
