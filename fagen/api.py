"""`fagen.attention`: validation, and the way to a kernel or to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fagen import binding, build, dispatch, env, fallback, kernel
from fagen.errors import FagenError, InvalidArgument, LaunchError
from fagen.families import Config, Family
from fagen.masks import interval_kind
from fagen.problem import MAX_HEAD_DIM, TORCH_DTYPES, Problem
from fagen.target import Target
from fagen.verify import Semantics

_DTYPES = {getattr(torch, theirs): ours for ours, theirs in TORCH_DTYPES.items()}
_NO_BACKWARD = "the inputs need gradients, and fagen has no backward kernel yet"

Window = tuple[int | None, int | None]

_fast: Callable[..., Any] | None = None  # the C++ road, once it is loaded


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str = "bshd",
    causal: bool = False,
    window: Window = (None, None),
    intervals: torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v, by the fastest kernel known for the problem.

    q is (batch, seqlen_q, heads, d), k (batch, seqlen_k, kv_heads, d), v (batch, seqlen_k, kv_heads, dv); with
    layout="bhsd" heads come before rows. Any strides with a contiguous last dimension; heads is a multiple of
    kv_heads. fp16, bf16, float32 and float64; what no kernel of ours serves is computed by PyTorch, with a warning.

    causal        row i sees key j where j <= i + seqlen_k - seqlen_q (aligned bottom-right)
    window        (left, right): keys visible on either side of that diagonal; None for no bound
    intervals     int32 (batch or 1, 1 or kv_heads, seqlen_k, 1, 2 or 4): rows masked out per key, see `fagen.masks`
    softcap       s -> softcap * tanh(s / softcap); 0 for none
    alibi_slopes  float32 (heads) or (batch, heads): s -> s - slope * distance from the diagonal
    scale         of q k^T; 1 / sqrt(d) if not given
    return_lse    (out, lse): the natural log of the sum of exponentials, float32 (batch, heads, seqlen_q)
    out           where to put the result

    A row that sees no key gives 0, and -inf in lse.
    """
    if not torch.compiler.is_compiling() and _fast is not None and out is None:
        answer = _fast(q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, return_lse)
        if answer is not None:
            return answer
    return _attention(q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, return_lse, out)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str,
    causal: bool,
    window: Window,
    intervals: torch.Tensor | None,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    scale: float | None,
    return_lse: bool,
    out: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Every call that is not of the usual kind, or the first; also what torch.compile traces."""
    left, right = check(q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, out)
    options: dict[str, Any] = {
        "layout": layout, "causal": causal, "window": (left, right), "intervals": intervals, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "scale": scale,
    }  # fmt: skip
    reason = _refusal(q, k, v, alibi_slopes, scale)
    if reason:
        fallback.warn(reason)
        return _finish(fallback.attend(q, k, v, want_lse=return_lse, **options), return_lse, out)
    if not _ops_ready():
        if torch.compiler.is_compiling():
            return _finish(fallback.attend(q, k, v, want_lse=return_lse, **options), return_lse, out)
        return _without_binding(q, k, v, options, return_lse, out)
    args = (q, k, v, intervals, alibi_slopes, layout == "bhsd", causal, left, right, float(softcap), scale)
    if out is not None:
        lse = torch.ops.fagen.forward_out(*args, return_lse, out)
        return (out, lse) if return_lse else out
    if return_lse:
        return torch.ops.fagen.forward_lse(*args)
    return torch.ops.fagen.forward(*args)


def _ops_ready() -> bool:
    """Whether the ops are registered; makes them so if that can be. torch.compile runs this while it traces."""
    global _fast
    if _fast is None:
        module = binding.load()
        _fast = module.attention if module is not None else None
    return _fast is not None


# what torch.compiler.assume_constant_result sets, without the second that importing torch._dynamo for it takes
vars(_ops_ready)["_dynamo_marked_constant"] = True


def _finish(result: tuple[torch.Tensor, torch.Tensor], return_lse: bool, out: torch.Tensor | None) -> Any:
    value, lse = result
    if out is not None:
        value = out.copy_(value)
    return (value, lse) if return_lse else value


def _refusal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alibi_slopes: torch.Tensor | None, scale: float | None
) -> str:
    """Why the ops cannot be asked at all; "" if they can."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, alibi_slopes)):
        return _NO_BACKWARD
    if scale is not None and not scale > 0:
        return f"scale={scale} is not positive"  # the kernels take the maximum before they scale
    if q.device.type not in ("cpu", "cuda"):
        return f"no kernels for device {q.device.type}"
    return ""


# ---- validation ---------------------------------------------------------------------------------------------------


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: str = "bshd",
    causal: bool = False,
    window: Window = (None, None),
    intervals: torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[int, int]:
    """Raise InvalidArgument for what is not attention; else the window, -1 for unbounded, causal folded in."""
    if layout not in ("bshd", "bhsd"):
        raise InvalidArgument(f"layout {layout!r} is unknown", "known: bshd, bhsd")
    row, head = (1, 2) if layout == "bshd" else (2, 1)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise InvalidArgument(f"{name} has {t.dim()} dimensions", f"layout {layout} has 4: {tuple(t.shape)}")
        if t.dtype != q.dtype or not t.dtype.is_floating_point or t.dtype.itemsize < 2:
            have = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
            raise InvalidArgument("q, k and v must have the same floating-point dtype", have, "cast them: x.to(...)")
        if t.device != q.device:
            raise InvalidArgument("q, k and v must be on the same device", f"q {q.device}, k {k.device}, v {v.device}")
    batch, heads, kv_heads = q.shape[0], q.shape[head], k.shape[head]
    keys = (batch, k.shape[row], kv_heads)
    for name, t, size in (("k", k, q.shape[3]), ("v", v, v.shape[3])):
        if (t.shape[0], t.shape[row], t.shape[head], t.shape[3]) != (*keys, size):
            wants = "(batch_size, seqlen_k, num_heads_k, head_size)"
            have = f"{name} {tuple(t.shape)}, q {tuple(q.shape)}, k {tuple(k.shape)} in layout {layout}"
            raise InvalidArgument(f"{name} must have shape {wants}", have)
    if q.shape[3] == 0 or v.shape[3] == 0 or heads == 0 or kv_heads == 0:
        raise InvalidArgument("heads and head_dim must be at least 1", f"q {tuple(q.shape)}, v {tuple(v.shape)}")
    if heads % kv_heads:
        raise InvalidArgument(
            "Number of heads in key/value must divide number of heads in query", f"heads={heads} kv_heads={kv_heads}"
        )
    if not softcap >= 0:
        raise InvalidArgument(f"softcap={softcap} must be positive, or 0 for none")
    if intervals is not None:
        _check_intervals(intervals, q, keys, causal)
    if alibi_slopes is not None:
        _check_alibi(alibi_slopes, q, heads)
    if out is not None:
        _check_out(out, (*q.shape[:3], v.shape[3]), q)
    return _resolved_window(causal, window)


def _resolved_window(causal: bool, window: Window) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise InvalidArgument(f"window={window!r} is not (left, right)", "", "None stands for no bound")
    left, right = (-1 if bound is None else bound for bound in window)
    if not (isinstance(left, int) and isinstance(right, int)) or not -1 <= min(left, right) <= max(left, right) < 2**31:
        raise InvalidArgument(f"window={window!r}: bounds are integers of at least 0", "", "None stands for no bound")
    return left, 0 if causal else right


def _check_intervals(intervals: torch.Tensor, q: torch.Tensor, keys: tuple[int, int, int], causal: bool) -> None:
    batch, seqlen_k, kv_heads = keys
    wants = f"(1 or {batch}, 1 or {kv_heads}, {seqlen_k}, 1, 2 or 4)"
    if intervals.dtype != torch.int32:
        raise InvalidArgument(f"intervals must be int32, not {intervals.dtype}", "", "cast them: x.to(torch.int32)")
    if intervals.device != q.device:
        raise InvalidArgument(f"intervals are on {intervals.device}", f"q is on {q.device}")
    shape = tuple(intervals.shape)
    # `in` would not do: torch.compile's sizes are symbols
    good = len(shape) == 4 and (shape[0] == 1 or shape[0] == batch) and (shape[1] == 1 or shape[1] == kv_heads)
    if not good or shape[2] != seqlen_k:
        raise InvalidArgument(f"intervals must have shape {wants}", f"they have {shape}")
    interval_kind(shape[3], causal)


def _check_alibi(slopes: torch.Tensor, q: torch.Tensor, heads: int) -> None:
    if slopes.dtype != torch.float32:
        raise InvalidArgument("ALiBi slopes must have dtype fp32", f"they have {slopes.dtype}")
    if slopes.device != q.device:
        raise InvalidArgument(f"alibi_slopes are on {slopes.device}", f"q is on {q.device}")
    shape = tuple(slopes.shape)
    if shape != (heads,) and shape != (1, heads) and shape != (q.shape[0], heads):
        raise InvalidArgument(
            "alibi_slopes must have shape (heads) or (batch, heads)", f"they have {tuple(slopes.shape)}, heads={heads}"
        )


def _check_out(out: torch.Tensor, shape: tuple[int, ...], q: torch.Tensor) -> None:
    if tuple(out.shape) != shape or out.dtype != q.dtype or out.device != q.device:
        have = f"it is {out.dtype} {tuple(out.shape)} on {out.device}"
        raise InvalidArgument(f"out must be {q.dtype} {shape} on {q.device}", have)
    if out.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument("out requires a gradient", "", "pass out.detach(), or no out")


# ---- from a call to a kernel --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A valid call in the words of the other modules. If no problem describes it, `refusal` says why."""

    problem: Problem | None
    target: Target | None
    semantics: Semantics
    refusal: str = ""


def describe(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str = "bshd",
    causal: bool = False,
    window: Window = (None, None),
    intervals: torch.Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Call:
    """What a call of `attention` asks for. Raises InvalidArgument with what is wrong with it."""
    left, right = check(q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, out)
    kind = interval_kind(intervals.shape[3], causal) if intervals is not None else ""
    semantics = Semantics((left, right), kind, float(softcap), scale)
    target = dispatch.target_of(q.device)
    refusal = _refusal(q, k, v, alibi_slopes, scale) or _unservable(q, k, v, intervals, alibi_slopes, out)
    if target is None and not refusal:
        refusal = f"no kernels for device {q.device}"
    if refusal:
        return Call(None, target, semantics, refusal)
    mask = "intervals" if kind else {(-1, -1): "none", (-1, 0): "causal"}.get((left, right), "window")
    row, head = (1, 2) if layout == "bshd" else (2, 1)
    tensors = (q, k, v) if out is None else (q, k, v, out)
    fresh_out_aligned = out is not None or v.shape[3] * v.element_size() % kernel.ALIGNMENT == 0
    problem = Problem(
        dtype=_DTYPES[q.dtype],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        mask=mask,
        intervals=kind,
        softcap=bool(softcap),
        alibi=alibi_slopes is not None,
        aligned=fresh_out_aligned and all(kernel.is_aligned(t) for t in tensors),
        batch=q.shape[0],
        heads=q.shape[head],
        kv_heads=k.shape[head],
        seqlen_q=q.shape[row],
        seqlen_k=k.shape[row],
        window_left=left,
        window_right=right,
    )
    return Call(problem, target, semantics)


def _unservable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor | None,
) -> str:
    """Why no family could take the tensors as they are; "" if one might."""
    if 0 in q.shape or 0 in k.shape:
        return fallback.EMPTY
    if q.dtype not in _DTYPES:
        return f"no kernels for {q.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head_dim {max(q.shape[3], v.shape[3])} is larger than {MAX_HEAD_DIM}"
    named = {"q": q, "k": k, "v": v, "out": out, "intervals": intervals, "alibi_slopes": alibi_slopes}
    for name, t in named.items():
        if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1:
            return f"the last dimension of {name} is not contiguous"
    return ""


def resolve(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> kernel.Kernel | None:
    """The kernel for a call, built and loaded; None (and a warning) where PyTorch computes."""
    with torch.no_grad():  # whether gradients are needed was decided before
        call = describe(q, k, v, **options)
    if call.refusal:
        fallback.warn(call.refusal)
        return None
    assert call.problem is not None and call.target is not None
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise LaunchError(
            f"a CUDA graph capture met a kernel that is not loaded: {call.problem}",
            "nothing is compiled or loaded during a capture",
            "make the same call once before capturing (compile ahead of that with: fagen build)",
        )
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # where a stale kernel is verified
        return kernel_for(call.problem, call.target, ours=bool(options.get("return_lse")))


def kernel_for(problem: Problem, target: Target, *, ours: bool = False) -> kernel.Kernel | None:
    """The chosen kernel, compiled now if need be; None where PyTorch computes, with a warning unless it is faster.

    `ours`: a kernel all the same where PyTorch is faster, as for the LSE, which it does not give.
    """
    choice = dispatch.choose(problem, target, check=True, ours=ours)
    if choice.family is None or choice.config is None:
        if choice.record is None:
            fallback.warn("; ".join(choice.reasons) or "no family serves the problem")
        return None
    try:
        return built(choice.family, problem, target, choice.config)
    except FagenError as error:
        if env.flag("FAGEN_DISABLE_JIT"):
            raise
        fallback.warn(" ".join(str(error).splitlines()))
        return None


def built(family: Family, problem: Problem, target: Target, config: Config) -> kernel.Kernel:
    """Loaded, and compiled before that if need be, which is said."""
    job = build.job(family, problem, target, config)

    def tell() -> None:
        binding.say(f"compiling {job.name} (about {build.expected_seconds(family, target):.0f} s, once)")

    return kernel.load(build.make(job, tell=tell), family, problem, config)


def _without_binding(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any], return_lse: bool, out: Any
) -> Any:
    """No C++ ops: a kernel that is already built is called through ctypes, everything else by PyTorch."""
    found = resolve(q, k, v, out=out, return_lse=return_lse, **options)
    if found is None:
        return _finish(fallback.attend(q, k, v, want_lse=return_lse, **options), return_lse, out)
    layout = options["layout"]
    row, head = (1, 2) if layout == "bshd" else (2, 1)
    result = q.new_empty((*q.shape[:3], v.shape[3])) if out is None else out
    lse = q.new_empty((q.shape[0], q.shape[head], q.shape[row]), dtype=torch.float32) if return_lse else None
    names = ("intervals", "alibi_slopes", "window", "scale", "softcap")
    found.launch(q, k, v, result, lse, layout=layout, **{name: options[name] for name in names})
    return (result, lse) if return_lse else result


def warmup(problems: list[Problem], target: Target | None = None) -> None:
    """Compile what these problems need, and the binding, ahead of the first call."""
    from fagen.target import detect

    binding.load()
    for problem in problems:
        kernel_for(problem, target or detect())
