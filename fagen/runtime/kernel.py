"""A built kernel, loaded with ctypes and callable on tensors. Tuner and tests use this; the op's own road is C++."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fagen.build import cache
from fagen.codegen.spec import KernelSpec
from fagen.errors import InvalidArgument, LaunchError
from fagen.ops.attention.params import Params, _order, _want, is_aligned, make_params
from fagen.ops.attention.problem import INTERVAL_KINDS, TORCH_DTYPES
from fagen.timing.timer import Call

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from fagen.build.job import Artifact

WORKSPACE_ALIGNMENT = 256


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


def workspace_tensor(size: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Memory of at least `size` bytes, and the aligned address in it."""
    import torch

    memory = torch.empty(size + WORKSPACE_ALIGNMENT, dtype=torch.uint8, device=device)
    return memory, -(-memory.data_ptr() // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT


@dataclass(frozen=True)
class Kernel:
    """Callable for every size point of the static key of `spec.problem`."""

    spec: KernelSpec
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
        if self.spec.problem.mask == "causal" and window == (-1, -1):
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
        raise LaunchError(f"{self.spec.family.name} could not run: {text}", f"{shapes}: {self.spec.config}")

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
        mine = self.spec.problem
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


@functools.lru_cache(maxsize=1024)
def _library(path: Path, key: str) -> Library:
    return Library(path)


def load(artifact: Artifact, spec: KernelSpec) -> Kernel:
    return Kernel(spec, artifact, _library(artifact.path, artifact.key))


def get(spec: KernelSpec) -> Kernel:
    """Built if need be, and loaded."""
    return load(cache.build(spec), spec)


def launcher(kernel: Kernel, inputs: dict[str, Any], *, lse: bool = False) -> Call:
    """The kernel on these inputs, to be called again and again.

    A GPU launch is prepared anew each time, since a graph captures it on a stream of its own.
    """
    s = inputs["semantics"]
    tensors = [inputs[name] for name in ("q", "k", "v", "out")] + ([inputs["lse"]] if lse else [])
    options = {name: inputs[name] for name in ("intervals", "alibi_slopes", "layout")}
    options |= {"window": s.window, "scale": s.scale, "softcap": s.softcap}
    if inputs["q"].is_cuda:
        return functools.partial(kernel.launch, *tensors, **options)
    return kernel.bind(*tensors, **options)
