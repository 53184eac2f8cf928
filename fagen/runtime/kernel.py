"""A built kernel, loaded with ctypes and callable on tensors. Tuner and tests use this; the op's own road is C++."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from fagen import ops
from fagen.build import cache
from fagen.codegen.spec import KernelSpec
from fagen.errors import InvalidArgument, LaunchError
from fagen.ops import abi
from fagen.timing import timer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from fagen.build.job import Artifact
    from fagen.ops.base import Call, Calls
    from fagen.ops.inputs import Inputs

WORKSPACE_ALIGNMENT = 256


class Library:
    """The functions that every kernel's .so exports, for the params with which it was built."""

    def __init__(self, path: Path, params: abi.Struct) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            self.launch = self._library.fagen_launch
            self.error = self._library.fagen_error
            self.workspace_bytes = self._library.fagen_workspace_bytes
            params_layout = self._library.fagen_params_layout
        except (OSError, AttributeError) as error:
            raise LaunchError(f"kernel {path} cannot be loaded", str(error)) from error
        self.launch.restype, self.launch.argtypes = ctypes.c_int, [ctypes.POINTER(params), ctypes.c_void_p]
        self.error.restype, self.error.argtypes = ctypes.c_char_p, [ctypes.c_int]
        self.workspace_bytes.restype = ctypes.c_uint64
        self.workspace_bytes.argtypes = [ctypes.POINTER(params)]
        params_layout.restype, params_layout.argtypes = ctypes.c_char_p, []
        built, ours = (params_layout() or b"").decode(errors="replace"), abi.layout(params)
        if built != ours:
            raise LaunchError(
                f"kernel {path} was built for another {params.__name__}",
                abi.difference(built, ours),
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

    @property
    def calls(self) -> Calls:
        return ops.get(self.spec.problem.op).calls()

    def launch(self, call: Call, outputs: Mapping[str, torch.Tensor], **options: Any) -> None:
        """Fill the outputs as `bind` describes; asynchronous on a GPU."""
        self.bind(call, outputs, **options)()

    def bind(
        self,
        call: Call,
        outputs: Mapping[str, torch.Tensor],
        *,
        workspace: torch.Tensor | None = None,
        stream: int | None = None,
    ) -> Callable[[], None]:
        """All checks and preparations of a launch done once; what is returned only launches (for timing).

        The outputs are one of the op's `variants`. It runs on the stream that is current now, or on `stream`, and
        keeps the tensors alive.
        """
        self._check(call, outputs)
        first, params = _first(call), self.calls.params(call, outputs)
        device = selected(first)
        with device:  # a kernel may ask it for its SMs
            need = self.library.workspace_bytes(ctypes.byref(params))
        if need and workspace is None:
            workspace, params.workspace = workspace_tensor(need, first.device)
        elif need and workspace is not None:
            if workspace.numel() * workspace.element_size() < need or workspace.data_ptr() % WORKSPACE_ALIGNMENT:
                raise InvalidArgument("the workspace is too small or not aligned", f"{need} bytes, 256-byte aligned")
            params.workspace = workspace.data_ptr()
        if first.is_cuda and stream is None:
            stream = _current_stream(first)
        launch, reference = self.library.launch, ctypes.byref(params)
        alive = (call, dict(outputs), workspace)

        def start() -> None:
            with device:
                status = launch(reference, stream)
            if status != 0:
                self.fail(status, alive[0].inputs())

        return start

    def fail(self, status: int, inputs: Mapping[str, torch.Tensor]) -> NoReturn:
        """Raise LaunchError for what a launch returned."""
        text = (self.library.error(status) or b"unknown").decode(errors="replace")
        shapes = " ".join(str(tuple(t.shape)) for t in inputs.values())
        raise LaunchError(f"{self.spec.family.name} could not run: {text}", f"{shapes}: {self.spec.config}")

    def _check(self, call: Call, outputs: Mapping[str, torch.Tensor]) -> None:
        """A call that contradicts itself, or that is one for another kernel, would be read astray."""
        calls = self.calls
        known = " or ".join(", ".join(names) for names in calls.variants)
        _want(any(set(names) == outputs.keys() for names in calls.variants), f"the outputs must be {known}")
        call.check_tensors()
        name, device = next(iter(call.inputs())), _first(call).device
        wanted = "cpu" if self.artifact.arch == "cpu" else "cuda"
        _want(device.type == wanted, f"{name} is on {device}", f"the kernel is for {self.artifact.arch}")
        types = call.output_types()
        for name, t in outputs.items():
            shape, dtype = types[name]
            good = tuple(t.shape) == shape and t.dtype == dtype and t.device == device and t.stride(-1) == 1
            have = f"it is {t.dtype} {tuple(t.shape)} on {t.device}"
            _want(good, f"{name} must be {dtype} {shape} on {device}, its last dimension contiguous", have)
        calls.require(self.spec.problem, call, outputs)


def _first(call: Call) -> torch.Tensor:
    """A tensor of the call, which tells its device."""
    return next(iter(call.inputs().values()))


def _want(good: bool, what: str, numbers: str = "") -> None:
    if not good:
        raise InvalidArgument(what, numbers)


def selected(t: torch.Tensor) -> Any:
    """A context in which the tensor's device is the current one; of no cost where it already is."""
    import torch

    if not t.is_cuda or torch.cuda.current_device() == t.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


def launch_on_stream(library: Library, params: ctypes.Structure, t: torch.Tensor) -> int:
    """Launch on the stream that is current on a tensor's device; the status. On the CPU: call."""
    if not t.is_cuda:
        return int(library.launch(params, None))
    with selected(t):
        return int(library.launch(params, _current_stream(t)))


def _current_stream(t: torch.Tensor) -> int:
    import torch

    return torch.cuda.current_stream(t.device).cuda_stream


@functools.lru_cache(maxsize=1024)
def _library(path: Path, key: str, params: abi.Struct) -> Library:
    return Library(path, params)


def load(artifact: Artifact, spec: KernelSpec) -> Kernel:
    return Kernel(spec, artifact, _library(artifact.path, artifact.key, abi.params(ops.get(spec.problem.op).header)))


def get(spec: KernelSpec) -> Kernel:
    """Built if need be, and loaded."""
    return load(cache.build(spec), spec)


def launcher(kernel: Kernel, inputs: Inputs, names: Iterable[str] | None = None) -> timer.Call:
    """The kernel on these inputs, to be called again and again, with outputs by name: those that are timed, if none.

    A GPU launch is prepared anew each time, since a graph captures it on a stream of its own.
    """
    outputs = {name: inputs.outputs[name] for name in (kernel.calls.timed if names is None else names)}
    if _first(inputs.call).is_cuda:
        return functools.partial(kernel.launch, inputs.call, outputs)
    return kernel.bind(inputs.call, outputs)
