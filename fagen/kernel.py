"""A built kernel, loaded with ctypes and callable on tensors. Tuner and tests use this; the op's own road is C++."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fagen import build
from fagen.errors import InvalidArgument, LaunchError
from fagen.problem import INTERVAL_KINDS, TORCH_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from fagen.build import Artifact
    from fagen.families import Config, Family
    from fagen.problem import Problem
    from fagen.target import Target

ALIGNMENT = 16  # bytes, of every row of an `aligned` problem
WORKSPACE_ALIGNMENT = 256

_Strides = ctypes.c_int64 * 3


class Params(ctypes.Structure):
    """`fagen_params` of `fagen/abi/forward.h`; its size is compared with the kernel's when one is loaded."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "q k v o lse intervals alibi_slopes workspace".split()),
        *((f"{name}_stride", _Strides) for name in "q k v o intervals".split()),
        ("alibi_stride", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in "batch heads kv_heads mask_heads seqlen_q seqlen_k head_dim head_dim_v "
            "window_left window_right".split()
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class Library:
    """The four functions that every kernel's .so exports."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            self.launch = self._library.fagen_launch
            self.error = self._library.fagen_error
            self.workspace_bytes = self._library.fagen_workspace_bytes
            params_size = self._library.fagen_params_size
        except (OSError, AttributeError) as error:
            raise LaunchError(f"kernel {path} cannot be loaded", str(error)) from error
        self.launch.restype, self.launch.argtypes = ctypes.c_int, [ctypes.POINTER(Params), ctypes.c_void_p]
        self.error.restype, self.error.argtypes = ctypes.c_char_p, [ctypes.c_int]
        self.workspace_bytes.restype = ctypes.c_uint64
        self.workspace_bytes.argtypes = [ctypes.POINTER(Params)]
        params_size.restype, params_size.argtypes = ctypes.c_uint32, []
        if params_size() != ctypes.sizeof(Params):
            raise LaunchError(
                f"kernel {path} was built for another fagen_params",
                f"its size there {params_size()}, here {ctypes.sizeof(Params)} bytes",
                "run: fagen cache clear",
            )

    def address(self, name: str) -> int:
        """Where an exported function lives, for the C++ op."""
        return ctypes.cast(self._library[name], ctypes.c_void_p).value or 0


def _order(layout: str) -> tuple[int, int, int]:
    """Where batch, row and head are."""
    if layout not in ("bshd", "bhsd"):
        raise InvalidArgument(f"layout {layout!r} is unknown", "known: bshd, bhsd")
    return (0, 1, 2) if layout == "bshd" else (0, 2, 1)


def make_params(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    intervals: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    layout: str = "bhsd",
) -> Params:
    """The struct; holds pointers, so the tensors must outlive it."""
    order = _order(layout)
    largest = max(*q.shape, *k.shape, *v.shape)
    _want(largest < 2**31, "a size is beyond 2^31 - 1", str(largest))  # ctypes would cut it
    params = Params(q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), o=out.data_ptr())
    for name, tensor in zip("qkvo", (q, k, v, out), strict=True):
        stride = tensor.stride()
        setattr(params, f"{name}_stride", _Strides(*(stride[i] for i in order)))
    if lse is not None:
        params.lse = lse.data_ptr()
    if intervals is not None:
        params.intervals, params.mask_heads = intervals.data_ptr(), intervals.shape[1]
        batch, head, key, _ = intervals.stride()
        params.intervals_stride = _Strides(batch if intervals.shape[0] > 1 else 0, head, key)
    if alibi_slopes is not None:
        params.alibi_slopes = alibi_slopes.data_ptr()
        several = alibi_slopes.dim() == 2 and alibi_slopes.shape[0] > 1
        params.alibi_stride = alibi_slopes.stride(0) if several else 0
    _, row, head = order
    params.batch, params.seqlen_q, params.heads = q.shape[0], q.shape[row], q.shape[head]
    params.seqlen_k, params.kv_heads = k.shape[row], k.shape[head]
    params.head_dim, params.head_dim_v = q.shape[3], v.shape[3]
    # a wider band shows no more, and its sum with a row would leave 32 bits
    params.window_left, params.window_right = min(window[0], params.seqlen_k), min(window[1], params.seqlen_q)
    params.scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    params.softcap = softcap
    return params


def workspace_tensor(size: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Memory of at least `size` bytes, and the aligned address in it."""
    import torch

    memory = torch.empty(size + WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=device)
    return memory, -(-memory.data_ptr() // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT


@dataclass(frozen=True)
class Kernel:
    """Callable for every size point of `problem`'s static key. Only the static part of `problem` counts."""

    family: Family
    problem: Problem
    config: Config
    artifact: Artifact
    library: Library = field(repr=False)

    @property
    def facts(self) -> dict[str, Any]:
        return self.artifact.facts

    def launch(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, *args: Any, **options: Any
    ) -> torch.Tensor:
        """Fill `out` (and `lse`) as `bind` describes; asynchronous on a GPU. Returns `out`."""
        self.bind(q, k, v, out, *args, **options)()
        return out

    def bind(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        *,
        intervals: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        window: tuple[int, int] = (-1, -1),
        scale: float | None = None,
        softcap: float = 0.0,
        layout: str = "bhsd",
        workspace: torch.Tensor | None = None,
        stream: int | None = None,
    ) -> Callable[[], None]:
        """All checks and preparations of a launch done once; what is returned only launches (for timing).

        It runs on the stream that is current now, or on `stream`, and keeps the tensors alive.
        """
        if self.problem.mask == "causal" and window == (-1, -1):
            window = (-1, 0)
        self._check(q, k, v, out, lse, intervals, alibi_slopes, window, softcap, layout)
        params = make_params(
            q, k, v, out, lse, intervals=intervals, alibi_slopes=alibi_slopes, window=window, scale=scale,
            softcap=softcap, layout=layout,
        )  # fmt: skip
        need = self.library.workspace_bytes(ctypes.byref(params))
        if need and workspace is None:
            workspace, params.workspace = workspace_tensor(need, q.device)
        elif need and workspace is not None:
            if workspace.numel() * workspace.element_size() < need or workspace.data_ptr() % WORKSPACE_ALIGNMENT:
                raise InvalidArgument("the workspace is too small or not aligned", f"{need} bytes, 256-byte aligned")
            params.workspace = workspace.data_ptr()
        device = _select(q)
        if q.is_cuda and stream is None:
            stream = _current_stream(q)
        launch, reference = self.library.launch, ctypes.byref(params)
        alive = (q, k, v, out, lse, intervals, alibi_slopes, workspace)

        def call() -> None:
            with device:
                status = launch(reference, stream)
            if status != 0:
                self._fail(status, alive)

        return call

    def _fail(self, status: int, tensors: tuple[Any, ...]) -> None:
        text = (self.library.error(status) or b"unknown").decode(errors="replace")
        shapes = " ".join(str(tuple(t.shape)) for t in tensors[:3])
        raise LaunchError(f"{self.family.name} could not run: {text}", f"{shapes}: {self.config}")

    def _check(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        intervals: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        window: tuple[int, int],
        softcap: float,
        layout: str,
    ) -> None:
        """What would make the kernel read or write where it must not, or compute something else than it is asked."""
        mine = self.problem
        _, row, head = _order(layout)
        for name, t in (("q", q), ("k", k), ("v", v), ("out", out)):
            good = str(t.dtype) == f"torch.{TORCH_DTYPES[mine.dtype]}"
            _want(good, f"{name} is {t.dtype}", f"the kernel is for {mine.dtype}")
            _want(t.device == q.device, f"{name} is on {t.device}", f"q is on {q.device}")
            _want(t.dim() == 4 and t.stride(3) == 1, f"{name} must have 4 dimensions, the last one contiguous")
            if mine.aligned:
                _want(is_aligned(t), f"{name} is not aligned", "the kernel needs rows of whole 16-byte pieces")
        wanted = "cpu" if self.artifact.arch == "cpu" else "cuda"
        _want(q.device.type == wanted, f"q is on {q.device}", f"the kernel is for {self.artifact.arch}")
        batch, sq, heads, sk, kv = q.shape[0], q.shape[row], q.shape[head], k.shape[row], k.shape[head]
        _want(mine.replace(head_dim=q.shape[3], head_dim_v=v.shape[3]).static_key == mine.static_key, "head_dim",
              f"{q.shape[3]}-{v.shape[3]}, the kernel is for {mine.static_key}")  # fmt: skip
        wants = {
            "k": (batch, sk, kv, q.shape[3]),
            "v": (batch, sk, kv, v.shape[3]),
            "out": (batch, sq, heads, v.shape[3]),
        }
        for name, t in (("k", k), ("v", v), ("out", out)):
            have = (t.shape[0], t.shape[row], t.shape[head], t.shape[3])
            _want(have == wants[name], f"{name} has the wrong shape", f"{tuple(t.shape)} in layout {layout}")
        _want(kv > 0 and heads % kv == 0, "heads must be a multiple of kv_heads", f"heads={heads} kv_heads={kv}")
        _want_extra("lse", lse, lse is not None, q, "float32", [(batch, heads, sq)])
        _want(lse is None or lse.is_contiguous(), "lse must be contiguous")
        columns = len(INTERVAL_KINDS.get(mine.intervals, ()))
        shapes: list[tuple[int, ...]] = [(b, h, sk, columns) for b in (1, batch) for h in (1, kv)]
        _want_extra("intervals", intervals, mine.mask == "intervals", q, "int32", shapes)
        shapes = [(heads,), (1, heads), (batch, heads)]
        _want_extra("alibi_slopes", alibi_slopes, mine.alibi, q, "float32", shapes)
        _want(bool(softcap) == mine.softcap, f"softcap={softcap}", f"the kernel has softcap={mine.softcap}")
        bands = {"none": window == (-1, -1), "causal": window == (-1, 0)}
        _want(bands.get(mine.mask, True), f"window={window}", f"the kernel's mask is {mine.mask}")


def _want(good: bool, what: str, numbers: str = "") -> None:
    if not good:
        raise InvalidArgument(what, numbers)


def _want_extra(
    name: str, t: torch.Tensor | None, due: bool, q: torch.Tensor, dtype: str, shapes: list[tuple[int, ...]]
) -> None:
    """A tensor that some kernels take and others do not."""
    _want((t is not None) == due, f"{name} {'is missing' if due else 'is not what this kernel takes'}")
    if t is not None:
        have = f"{t.dtype} {tuple(t.shape)} on {t.device}"
        _want(tuple(t.shape) in shapes, f"{name} must have shape {shapes[-1]}", have)
        good = str(t.dtype) == f"torch.{dtype}" and t.device == q.device and t.stride(-1) == 1
        _want(good, f"{name} must be {dtype} on {q.device}, its last dimension contiguous", have)


def _select(q: torch.Tensor) -> Any:
    """A context in which the tensor's device is the current one; of no cost where it already is."""
    import torch

    if not q.is_cuda or torch.cuda.current_device() == q.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(q.device)


def _current_stream(q: torch.Tensor) -> int:
    import torch

    return torch.cuda.current_stream(q.device).cuda_stream


def is_aligned(t: torch.Tensor) -> bool:
    """Every row starts at a multiple of 16 bytes, is whole 16-byte pieces, and lies apart from the others.

    An expanded dimension (stride 0) counts as not aligned: a tensor map is not known to take it.
    """
    item = t.element_size()
    if t.data_ptr() % ALIGNMENT or t.shape[-1] * item % ALIGNMENT:
        return False
    strides = (t.stride(i) for i in range(t.dim() - 1) if t.shape[i] > 1)  # others are never used
    return all(stride != 0 and stride * item % ALIGNMENT == 0 for stride in strides)


@functools.lru_cache(maxsize=1024)
def _library(path: Path, key: str) -> Library:
    return Library(path)


def load(artifact: Artifact, family: Family, problem: Problem, config: Config) -> Kernel:
    return Kernel(family, problem, config, artifact, _library(artifact.path, artifact.key))


def get(family: Family, problem: Problem, target: Target, config: Config) -> Kernel:
    """Built if need be, and loaded."""
    return load(build.build(family, problem, target, config), family, problem, config)
