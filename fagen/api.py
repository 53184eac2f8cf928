"""`fagen.attention`: the way of a call to a kernel or to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fagen import arguments, binding, build, dispatch, env, fallback, kernel
from fagen.arguments import Window
from fagen.errors import FagenError, LaunchError
from fagen.families import Config, Family
from fagen.masks import interval_kind
from fagen.problem import MAX_HEAD_DIM, TORCH_DTYPES, Problem
from fagen.target import Target
from fagen.verify import Semantics

_DTYPES = {getattr(torch, theirs): ours for ours, theirs in TORCH_DTYPES.items()}
_LONGEST = 1 << 29  # rows or keys: what a kernel takes for "without bound" lies there

_fast: Callable[..., Any] | None = None  # the C++ road, once it is loaded
_fast_sdpa: Callable[..., Any] | None = None


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
    out           where to put the result; it may share memory with no input

    Derivatives, forward and reverse, are PyTorch's. A row that sees no key gives 0, and -inf in lse.
    """
    if not torch.compiler.is_compiling() and _fast is not None:
        answer = _fast(q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, return_lse, out)
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
    return_lse = arguments.flag("return_lse", return_lse)
    causal, window, softcap, scale = arguments.check(
        q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, out
    )
    options: dict[str, Any] = {
        "layout": layout, "causal": causal, "window": window, "intervals": intervals, "softcap": softcap,
        "alibi_slopes": alibi_slopes, "scale": scale,
    }  # fmt: skip
    reason = _refusal(q, k, v, alibi_slopes, scale)
    if reason:
        fallback.warn(reason)
    if reason or not _ops_ready():
        return _without_ops(q, k, v, options, return_lse, out, reason)
    args = (q, k, v, intervals, alibi_slopes, layout == "bhsd", causal, *window, softcap, scale)
    if out is not None:
        lse = torch.ops.fagen.forward_out(*args, return_lse, out)
        return (out, lse) if return_lse else out
    if return_lse:
        return torch.ops.fagen.forward_lse(*args)
    return torch.ops.fagen.forward(*args)


def _ops_ready() -> bool:
    """Whether the ops are registered; makes them so if that can be. torch.compile runs this while it traces."""
    global _fast, _fast_sdpa
    if _fast is None:
        module = binding.load()
        if module is not None:
            _fast, _fast_sdpa = module.attention, module.sdpa
    return _fast is not None


# what torch.compiler.assume_constant_result sets, without the second that importing torch._dynamo for it takes
vars(_ops_ready)["_dynamo_marked_constant"] = True


def _refusal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, alibi_slopes: torch.Tensor | None, scale: float | None
) -> str:
    """Why the ops cannot be asked at all; "" if they can."""
    if fallback.differentiated(q, k, v, alibi_slopes):
        return fallback.NO_BACKWARD
    if scale is not None and not scale >= arguments.LEAST_NUMBER:
        return f"scale={scale} is not positive"  # the kernels take the maximum before they scale
    if q.device.type not in ("cpu", "cuda"):
        return f"no kernels for device {q.device.type}"
    return ""


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
    arguments.flag("return_lse", return_lse)
    causal, (left, right), softcap, scale = arguments.check(
        q, k, v, layout, causal, window, intervals, softcap, alibi_slopes, scale, out
    )
    kind = interval_kind(intervals.shape[3], causal) if intervals is not None else ""
    semantics = Semantics((left, right), kind, softcap, scale)
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
    if max(*q.shape, *k.shape) > _LONGEST:
        return f"a size is larger than {_LONGEST}"
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


def _without_ops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any], return_lse: bool, out: Any, reason: str
) -> Any:
    """The C++ ops are not there, or cannot be asked: a kernel is called through ctypes, everything else by PyTorch."""
    tensors = {"q": q, "k": k, "v": v, "intervals": options["intervals"], "alibi_slopes": options["alibi_slopes"]}
    plain = not torch.compiler.is_compiling() and all(_has_memory(t) for t in (*tensors.values(), out) if t is not None)
    if plain and out is not None:
        arguments.refuse_overlap(out, **tensors)
    found = resolve(q, k, v, out=out, return_lse=return_lse, **options) if plain and not reason else None
    if found is None:
        value, lse = fallback.attend(q, k, v, want_lse=return_lse, **options)
        value = value if out is None else out.copy_(value)
        return (value, lse) if return_lse else value
    layout = options["layout"]
    row, head = (1, 2) if layout == "bshd" else (2, 1)
    result = q.new_empty((*q.shape[:3], v.shape[3])) if out is None else out
    rows_lse = q.new_empty((q.shape[0], q.shape[head], q.shape[row]), dtype=torch.float32) if return_lse else None
    names = ("intervals", "alibi_slopes", "window", "scale", "softcap")
    if out is not None:
        torch.autograd.graph.increment_version(out)
    found.launch(q, k, v, result, rows_lse, layout=layout, **{name: options[name] for name in names})
    return (result, rows_lse) if return_lse else result


def _has_memory(t: torch.Tensor) -> bool:
    """Not one of torch.func's, of a tracer's or of a subclass, which a kernel cannot be handed through ctypes."""
    functional = torch._C._functorch.is_functorch_wrapped_tensor(t)
    return type(t) in (torch.Tensor, torch.nn.Parameter) and not functional and not t.is_neg()


def warmup(problems: list[Problem], target: Target | None = None) -> None:
    """Compile what these problems need, and the binding, ahead of the first call."""
    from fagen.target import detect

    binding.load()
    for problem in problems:
        kernel_for(problem, target or detect())
