"""Arguments one by one: what is taken for a flag, a number, a bound or a tensor, and where a tensor's memory lies."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fagen.errors import InvalidArgument, InvalidType

LARGEST_SIZE = 2**31 - 1  # kernels count in 32 bits
LEAST_NUMBER = 1.1754943508222875e-38  # a positive float32 that a kernel does not take for 0
LARGEST_NUMBER = 2.3e38  # times log2(e) it still is a float32
_MOST_STEPS = 20_000  # of the search for an address that two tensors share

ALIGNMENT = 16  # bytes, of every row of an `aligned` problem

Window = tuple[int | None, int | None]


class Settings(NamedTuple):
    """The arguments that are no tensors, in the types that the ops take."""

    causal: bool
    window: tuple[int, int]  # -1: unbounded; causal is folded in
    softcap: float
    scale: float | None


# ---- numbers ------------------------------------------------------------------------------------------------------


def settings(causal: Any, window: Any, softcap: Any, scale: Any) -> Settings:
    causal, softcap = flag("causal", causal), number("softcap", softcap)
    if not softcap >= 0:
        raise InvalidArgument(f"softcap={softcap} must be positive, or 0 for none")
    if scale is not None:
        scale = number("scale", scale)
    smallest = LEAST_NUMBER if scale is None else max(LEAST_NUMBER, abs(scale) / LARGEST_NUMBER)
    if softcap and softcap < smallest:
        raise InvalidArgument(f"softcap={softcap} is too small for float32", f"at least {smallest:.3g}")
    left, right = _bounds(window)
    return Settings(causal, (left, 0 if causal else right), softcap, scale)


def flag(name: str, value: Any) -> bool:
    """A bool, of Python, NumPy or a tensor of no dimensions; 0 and 1 as well."""
    if isinstance(value, bool):
        return value
    if str(getattr(value, "dtype", "")) in ("bool", "torch.bool") and getattr(value, "ndim", 1) == 0:
        return bool(value)
    try:
        index = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        index = -1
    if index not in (0, 1):
        raise InvalidType(f"{name}={shown(value)} is neither True nor False")
    return index == 1


def number(name: str, value: Any) -> float:
    """A finite float32, of whatever converts to a float: NumPy's, a tensor of no dimensions."""
    if not isinstance(value, (float, int)):
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise InvalidArgument(f"{name} requires a gradient, which it cannot get", "", "multiply q by it instead")
        if not hasattr(value, "__float__"):
            raise InvalidType(f"{name}={shown(value)} is not a number")
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidType(f"{name}={shown(value)} is not a number", shown(error)) from error
    if not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        what = "must be positive and finite" if name == "softcap" else "must be finite"
        raise InvalidArgument(f"{name}={shown(value)} {what}", f"at most {LARGEST_NUMBER} in size")
    return float(value)


def probability(name: str, value: Any) -> float:
    value = number(name, value)
    if not 0 <= value <= 1:
        raise InvalidArgument(f"{name}={value} must be between 0 and 1")
    return value


def integer(name: str, value: Any) -> int:
    """Of Python, NumPy, a tensor of no dimensions: of whatever is an index."""
    try:
        return value if isinstance(value, int) else operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(f"{name}={shown(value)} is not an integer", shown(error)) from error


def _bounds(window: Any) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise InvalidArgument(f"window={shown(window)} is not (left, right)", "", "None stands for no bound")
    left, right = (-1 if bound is None else bound for bound in window)
    try:
        left, right = integer("left", left), integer("right", right)
    except InvalidType as error:
        raise InvalidType(
            f"window={shown(window)}: bounds are integers of at least 0", "", "None stands for no bound"
        ) from error
    if not -1 <= min(left, right) <= max(left, right) <= LARGEST_SIZE:
        raise InvalidArgument(
            f"window={shown(window)}: bounds are integers of at least 0", "", "None stands for no bound"
        )
    return left, right


def shown(value: Any) -> str:
    """An argument in a message: one line, and a short one."""
    try:
        text = " ".join((str if isinstance(value, Exception) else repr)(value).split())
    except (ValueError, RuntimeError):  # an integer of thousands of digits, a tensor without values
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- tensors ------------------------------------------------------------------------------------------------------


def dense(name: str, t: Any) -> None:
    if not isinstance(t, torch.Tensor):
        raise InvalidType(f"{name} must be a tensor, not {type(t).__name__}")
    kind = "nested" if t.is_nested else "quantized" if t.is_quantized else ""
    if kind or t.layout != torch.strided:
        raise InvalidArgument(f"{name} must be a dense tensor, not {kind or t.layout}", f"it has dtype {t.dtype}")


# ---- memory ---------------------------------------------------------------------------------------------------------


def is_plain(t: torch.Tensor) -> bool:
    """A tensor with memory that may be looked at, and nobody who wants to see ops."""
    if torch.compiler.is_compiling() or type(t) not in (torch.Tensor, torch.nn.Parameter):
        return False
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return not modes and torch._C._functorch.peek_interpreter_stack() is None


def is_aligned(t: torch.Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes, is whole 16-byte pieces, and lies apart from the others.

    An expanded dimension (stride 0) counts as not aligned: a tensor map is not known to take it.
    """
    return not t.data_ptr() % ALIGNMENT and has_aligned_rows(t.shape, t.stride(), t.element_size())


def has_aligned_rows(shape: Sequence[int], strides: Sequence[int], item: int) -> bool:
    """As `is_aligned`, but for where the first row starts; `item` bytes an element."""
    if shape[-1] * item % ALIGNMENT:
        return False
    if 0 not in strides and not math.gcd(*strides[:-1]) * item % ALIGNMENT:
        return True
    for size, stride in zip(shape[:-1], strides, strict=False):
        if size > 1 and (stride == 0 or stride * item % ALIGNMENT):  # others are never used
            return False
    return True


def refuse_overlap(out: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    """A kernel reads its inputs, q as well, after it has begun to write: `out` must lie apart from all of them."""
    if overlaps_itself(out):
        have = f"sizes {tuple(out.shape)}, strides {out.stride()}"
        raise InvalidArgument("out: two of its elements share memory", have, "pass a tensor that is not expanded")
    for name, t in inputs.items():
        if may_overlap(out, t):
            raise InvalidArgument(f"out shares memory with {name}", "", f"pass a clone of {name}, or no out")


def overlaps_itself(t: torch.Tensor) -> bool:
    """Unless each dimension steps over all that those of smaller strides reach."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            return t.numel() > 0
        reach += stride * (size - 1) if size > 1 else 0
    return False


def may_overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a byte belongs to both. Exact, unless the search takes too many steps: then True.

    Indices i of a and j of b meet where sum(i * a's stride) - sum(j * b's stride) is what b begins behind a.
    """
    if a.numel() == 0 or b.numel() == 0 or a.device.type == "meta":
        return False
    ranges = {1: [1 - b.element_size(), a.element_size() - 1]}  # of what each stride is multiplied by
    for t, side in ((a, 1), (b, 0)):
        for stride, size in zip(t.stride(), t.shape, strict=True):
            step = ranges.setdefault(stride * t.element_size(), [0, 0])
            step[side] += (size - 1) if side else (1 - size)
    ranges.pop(0, None)
    terms = sorted(((stride, *ends) for stride, ends in ranges.items()), reverse=True)
    steps = _MOST_STEPS

    def reaches(at: int, target: int) -> bool:
        nonlocal steps
        steps -= 1
        stride, least, most = terms[at]
        if stride == 1 or steps <= 0:
            return steps <= 0 or least <= target <= most
        low, high = (sum(s * ends[side] for s, *ends in terms[at + 1 :]) for side in (0, 1))
        first, last = max(least, -((high - target) // stride)), min(most, (target - low) // stride)
        return any(reaches(at + 1, target - n * stride) for n in range(first, last + 1))

    return reaches(0, b.data_ptr() - a.data_ptr())


def int32(name: str, t: torch.Tensor | None, dimensions: int = 1) -> torch.Tensor | None:
    """Indices as kernels read them."""
    if t is None:
        return None
    dense(name, t)
    if t.dim() != dimensions:
        raise InvalidArgument(f"{name} has {t.dim()} dimensions, not {dimensions}", f"its shape is {tuple(t.shape)}")
    if t.dtype != torch.int32:
        if t.dtype != torch.int64:
            raise InvalidArgument(f"{name} must be int32", f"it is {t.dtype}")
        t = t.to(torch.int32)
    return t if t.is_contiguous() else t.contiguous()
