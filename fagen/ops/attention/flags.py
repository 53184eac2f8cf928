"""A problem as flags of the command line, for whatever names the command that helps."""

from __future__ import annotations

from fagen.ops.attention.problem import DTYPES, Problem


def of(problem: Problem, *, one_length: bool = True) -> list[str]:
    """What `fagen` reads as exactly this problem; with `one_length` equal lengths are said once."""
    p = problem
    words = ["--dtype", p.dtype]
    words += ["--head-dim", str(p.head_dim) if p.head_dim == p.head_dim_v else f"{p.head_dim}-{p.head_dim_v}"]
    words += ["--mask", p.mask]
    bounds = (p.window_left, p.window_right)
    if p.mask == "window" or (p.mask == "intervals" and bounds != (-1, -1)):
        words += ["--window", ",".join("none" if bound < 0 else str(bound) for bound in bounds)]
    if p.intervals:
        words += ["--interval-kind", p.intervals]
    contiguous = aligned(p.dtype, p.head_dim, p.head_dim_v)
    switches = {
        "--softcap": p.softcap,
        "--alibi": p.alibi,
        "--dropout": p.dropout,
        "--tf32": p.tf32,
        "--unaligned": contiguous and not p.aligned,
    }
    words += [flag for flag, on in switches.items() if on]
    if one_length and p.seqlen_q == p.seqlen_k:
        words += ["--seqlen", str(p.seqlen_q)]
    else:
        words += [f"--seqlen-q={p.seqlen_q}", f"--seqlen-k={p.seqlen_k}"]
    return [*words, "--batch", str(p.batch), "--heads", str(p.heads), "--kv-heads", str(p.kv_heads)]


def aligned(dtype: str, head_dim: int, head_dim_v: int) -> bool:
    """Whether the rows of contiguous tensors are whole 16-byte pieces."""
    return head_dim * DTYPES[dtype] % 16 == 0 and head_dim_v * DTYPES[dtype] % 16 == 0
