"""A kernel beside those that are searched: built once a target and loaded once a process, it serves all sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fagen import env
from fagen.build import cache
from fagen.build.job import Job, link_flags
from fagen.codegen import render
from fagen.errors import FagenError, LaunchError
from fagen.families import cpu_forward, device_limits
from fagen.notices import notify
from fagen.ops import abi
from fagen.runtime import background
from fagen.runtime.kernel import Library, launch_on_stream
from fagen.target import Target

if TYPE_CHECKING:
    import torch

_GPU_FLAGS = ("-O3", "-std=c++17", "-Xptxas=-v", "-lineinfo")


@dataclass(eq=False)
class Helper:
    name: str
    header: str  # of its params
    gpu: str  # templates
    cpu: str | None  # None: PyTorch does it on a CPU
    instead: str  # says what PyTorch does where the kernel cannot be built
    cpu_flags: tuple[str, ...] = ()
    capability: int = 80  # the least that a GPU needs
    libraries: dict[str, Library | None] = field(default_factory=dict)  # by arch; None: it cannot be built

    @property
    def params(self) -> Any:
        return abi.params(self.header)

    def rendered(self, target: Target) -> str:
        """The source, its own headers still included by name."""
        template = self.gpu if target.is_gpu else self.cpu
        assert template is not None
        return render.render(template) + abi.layout_function(self.header)

    def job(self, target: Target) -> Job:
        flags = (device_limits.gencode(target), *_GPU_FLAGS) if target.is_gpu else (*cpu_forward.FLAGS, *self.cpu_flags)
        suffix, source = ".cu" if target.is_gpu else ".cpp", render.fold(self.rendered(target))
        about = {"arch": target.arch}
        return Job(self._key(target), source, suffix, flags, link_flags(target, flags), target.arch, about=about)

    def library(self, target: Target, capturing: bool) -> Library | None:
        """The kernel, compiled now where calls wait for that; None where PyTorch does it, for now or for good."""
        if target.arch in self.libraries:
            return self.libraries[target.arch]
        if capturing or background.pending(self._key(target)):
            return None
        try:
            return self._find(target)
        except FagenError as error:
            self._give_up(target, error)
        return None

    def build(self, target: Target) -> None:
        """Compile it ahead of the first call, here or for another machine."""
        if not self._lacking(target):
            cache.make(self.job(target))

    def _key(self, target: Target) -> str:
        return f"{self.name}-{target.arch}"

    def _lacking(self, target: Target) -> str | None:
        if target.is_gpu:
            fits = target.capability >= self.capability
            return device_limits.needs_sm80(target) or (None if fits else f"needs sm_{self.capability}")
        return None if self.cpu else "needs a GPU"

    def _find(self, target: Target) -> Library | None:
        mode = env.build_mode()
        if self._lacking(target):
            self.libraries[target.arch] = None
        elif mode == "wait":
            self.libraries[target.arch] = self._load(target)
        elif (artifact := cache.find(self.job(target))) is not None:
            self.libraries[target.arch] = Library(artifact.path, self.params)
        elif mode == "never":
            self.libraries[target.arch] = None
        else:
            background.submit(self._key(target), lambda: self._load_beside(target))
        return self.libraries.get(target.arch)

    def _load(self, target: Target) -> Library:
        wanted = self.job(target)
        made = cache.make(wanted, tell=lambda: notify(f"compiling {wanted.name} (a few seconds, once)"))
        return Library(made.path, self.params)

    def _load_beside(self, target: Target) -> None:
        try:
            self.libraries[target.arch] = self._load(target)
        except FagenError as error:
            self._give_up(target, error)

    def _give_up(self, target: Target, error: FagenError) -> None:
        self.libraries[target.arch] = None
        background.tell(f"{self.instead}: {' '.join(str(error).splitlines())}")


def launch(library: Library, params: Any, t: torch.Tensor, failed: str) -> None:
    """On the stream that is current on the tensor's device; `failed` says what was not done if that cannot be."""
    status = launch_on_stream(library, params, t)
    if status:
        text = (library.error(status) or b"unknown").decode(errors="replace")
        raise LaunchError(f"{failed}: {text}", f"of a tensor {tuple(t.shape)} {t.dtype}")
