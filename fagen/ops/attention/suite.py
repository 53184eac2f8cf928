"""The problems of attention that `fagen tune` takes when none are named: few, common, and done in minutes."""

from __future__ import annotations

from fagen.ops.attention.problem import Problem
from fagen.target import Target


def default(target: Target) -> list[Problem]:
    return _gpu() if target.is_gpu else _cpu()


def _cpu() -> list[Problem]:
    """A small model's layers on a few cores: one static key each is compiled once for both lengths."""
    found = [
        Problem(dtype="fp32", head_dim=dim, mask=mask, heads=8, seqlen_q=length)
        for dim in (64, 128)
        for mask in ("none", "causal")
        for length in (512, 2048)
    ]
    found += [Problem(dtype="bf16", head_dim=dim, mask="causal", heads=8, seqlen_q=1024) for dim in (64, 128)]
    return found


def _gpu() -> list[Problem]:
    """Prefill of a 7B-sized model: full and causal, short and long."""
    found = [
        Problem(dtype="bf16", head_dim=128, mask=mask, batch=16384 // length, heads=16, seqlen_q=length)
        for mask in ("causal", "none")
        for length in (1024, 4096)
    ]
    found.append(Problem(dtype="bf16", head_dim=64, mask="causal", batch=4, heads=32, seqlen_q=4096))
    found.append(Problem(dtype="bf16", head_dim=128, mask="causal", batch=4, heads=32, kv_heads=8, seqlen_q=4096))
    return found
