"""The peers: what each needs, and how it is called on a row's inputs. All take and give (batch, seqlen, heads, dim).

A peer's `load` raises `Absent` where it is not installed. It gives `prepare`, which raises (`Cannot`, or whatever the
peer itself raises) for a row that the peer does not serve, and gives a function from inputs to the output. Of the
backward op there are three outputs: the gradients of q, k and v.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fagen.bench.rows import Inputs, Row
from fagen.errors import UsageError

OURS = "fagen"
PLAIN = "plain"  # ours once more, without what a row asks for beyond attention; no peer to be ahead of
Serve = Callable[[Inputs], Any]  # gives the output, or several in the order of the op's
Prepare = Callable[[Row, Inputs], Serve]


@dataclass(frozen=True)
class Held:
    """A participant held to something while it is called, as a backend, which its users set once. The clock sets it
    once a sample."""

    serve: Serve
    holds: tuple[Callable[[], AbstractContextManager[Any]], ...]

    def session(self) -> AbstractContextManager[Any]:
        with ExitStack() as stack:
            for hold in self.holds:
                stack.enter_context(hold())
            return stack.pop_all()

    def __call__(self, inputs: Inputs) -> Any:
        with self.session():
            return self.serve(inputs)


class Absent(Exception):
    """The peer is not here; the message says what is missing."""


class Cannot(Exception):
    """The peer has no way to compute the row."""


@dataclass(frozen=True)
class Loaded:
    """By the name of an op: what computes it, or why the peer does not. An op that is not named it does not compute."""

    by_op: Mapping[str, Prepare | str]
    version: str = ""


@dataclass(frozen=True)
class Entrant:
    """A peer that serves the op of a run."""

    prepare: Prepare
    version: str


_ATTENTION = ("forward", "backward", "training", "decode")
_TRAINED = ("forward", "backward", "training")
_BOTH = ("cuda", "cpu")


@dataclass(frozen=True)
class Peer:
    """`loader` is module:function; it is given the paths that the user named."""

    label: str
    devices: tuple[str, ...]
    loader: str
    ops: tuple[str, ...] = _ATTENTION  # that it could compute
    asked: tuple[str, ...] = _BOTH  # devices on which `--peers all` means it, too

    def load(self, device: str, paths: Mapping[str, Path]) -> Loaded:
        if device not in self.devices:
            raise Absent("it needs a GPU")
        module, _, function = self.loader.partition(":")
        return getattr(importlib.import_module(module), function)(paths)


_SOFTMAX, _FP8 = ("softmax",), ("forward_fp8",)
PEERS = {
    "cudnn": Peer("cuDNN (SDPA)", ("cuda",), "fagen.bench.sdpa:cudnn", (*_ATTENTION, *_FP8)),
    "fa2": Peer("FlashAttention 2 (SDPA)", ("cuda",), "fagen.bench.sdpa:fa2"),
    "flash_attn": Peer("FlashAttention 2 (flash_attn)", ("cuda",), "fagen.bench.flash:load_flash_attn"),
    "fa3": Peer("FlashAttention 3", ("cuda",), "fagen.bench.flash:load_fa3", (*_ATTENTION, *_FP8)),
    "fa4": Peer("FlashAttention 4", ("cuda",), "fagen.bench.flash:load_fa4"),
    "flex": Peer("FlexAttention", ("cuda",), "fagen.bench.flex:load"),
    "flash_mla": Peer("FlashMLA", ("cuda",), "fagen.bench.flash_mla:load", ("decode",)),
    "sdpa": Peer("SDPA, torch's choice", _BOTH, "fagen.bench.sdpa:sdpa", asked=("cpu",)),
    "efficient": Peer("memory-efficient (SDPA)", ("cuda",), "fagen.bench.sdpa:efficient", asked=()),
    "math": Peer("math (SDPA)", _BOTH, "fagen.bench.sdpa:math", asked=()),
    "ffpa": Peer("FFPA", ("cuda",), "fagen.bench.sdpa:ffpa", ("forward", "backward"), asked=()),
    "flashinfer": Peer("FlashInfer", ("cuda",), "fagen.bench.flash:load_flashinfer", ("forward", "backward", "decode")),
    PLAIN: Peer("fagen, nothing dropped, any order", _BOTH, "fagen.bench.attention:load_plain", _TRAINED, asked=()),
    "torch_softmax": Peer("torch.softmax", _BOTH, "fagen.bench.softmax:eager", _SOFTMAX),
    "fagen_16_bits": Peer("fagen in 16 bits", _BOTH, "fagen.bench.fp8:load_16_bits", _FP8),
    "fagen_quantizing": Peer("fagen, quantising included", _BOTH, "fagen.bench.fp8:load_quantizing", _FP8),
    "quack": Peer("QuACK", ("cuda",), "fagen.bench.softmax:quack", _SOFTMAX),
    "compiled_softmax": Peer("softmax through torch.compile", _BOTH, "fagen.bench.softmax:compiled", _SOFTMAX),
}


def chosen(words: str, device: str, op: str = "forward") -> list[str]:
    """Names of peers of --peers: all, none or a list."""
    able = [name for name, peer in PEERS.items() if op in peer.ops]
    names = [word.strip() for word in words.split(",") if word.strip()]
    if names == ["all"]:
        return [name for name in able if device in PEERS[name].devices and device in PEERS[name].asked]
    if names == ["none"]:
        return []
    for name in names:
        if name not in PEERS:
            raise UsageError(f"peer {name!r} is unknown", f"known: {', '.join(PEERS)}, all, none")
        if name not in able:
            raise UsageError(f"peer {name} computes no {op}", f"those that do: {', '.join(able)}")
    return list(dict.fromkeys(names))


def load(
    names: list[str], device: str, paths: Mapping[str, Path], op: str = "forward"
) -> tuple[dict[str, Entrant], dict[str, str]]:
    """The peers that are here, each prepared by what serves the op, and why each other one is not."""
    here: dict[str, Entrant] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            here[name] = _entrant(PEERS[name].load(device, paths), op)
        except Absent as error:
            absent[name] = str(error)
        except Exception as error:  # of its import: a version that does not fit, a library that is missing
            absent[name] = reason(error)
    return here, absent


def _entrant(loaded: Loaded, op: str) -> Entrant:
    prepare = loaded.by_op.get(op, f"it computes no {op} here")
    if isinstance(prepare, str):
        raise Absent(prepare)
    return Entrant(_verifiable(prepare), loaded.version)


def _verifiable(prepare: Prepare) -> Prepare:
    """A step of training is verified without dropout, so that there it may drop what it likes."""

    def checked(row: Row, inputs: Inputs) -> Serve:
        if getattr(row.problem, "dropout", False) and not row.training:
            raise Cannot("it drops weights of its own choice: its output could not be verified")
        return prepare(row, inputs)

    return checked


def reason(error: BaseException) -> str:
    """The first line of what was raised."""
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, Absent | Cannot) else f"{type(error).__name__}: {text}"[:200]
