"""The peers: what each needs, and how it is called on a row's inputs. All take and give (batch, seqlen, heads, dim).

A peer's `load` raises `Absent` where it is not installed. It gives `prepare`, which raises (`Cannot`, or whatever the
peer itself raises) for a row that the peer does not serve, and gives a function from inputs to the output. Of the
backward op there are three outputs: the gradients of q, k and v.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.bench.rows import Inputs, Row, options
from fagen.errors import UsageError

if TYPE_CHECKING:
    from fagen.ops.attention.backward_call import BackwardCall
    from fagen.ops.attention.call import AttentionCall
    from fagen.ops.attention.decode_call import DecodeCall
    from fagen.runtime.kernel import Kernel

OURS = "fagen"
Serve = Callable[[Inputs], Any]  # gives the output, or several in the order of the op's
Prepare = Callable[[Row, Inputs], Serve]


class Absent(Exception):
    """The peer is not here; the message says what is missing."""


class Cannot(Exception):
    """The peer has no way to compute the row."""


@dataclass(frozen=True)
class Loaded:
    prepare: Prepare  # of forward
    version: str = ""
    backward: Prepare | str = "it computes no gradients"  # or why there is none
    decode: Prepare | str = "it is not timed on a cache here"


@dataclass(frozen=True)
class Peer:
    """`loader` is module:function; it is given the paths that the user named."""

    label: str
    devices: tuple[str, ...]
    loader: str

    def load(self, device: str, paths: Mapping[str, Path]) -> Loaded:
        if device not in self.devices:
            raise Absent("it needs a GPU")
        module, _, function = self.loader.partition(":")
        return getattr(importlib.import_module(module), function)(paths)


PEERS = {
    "cudnn": Peer("cuDNN (SDPA)", ("cuda",), "fagen.bench.sdpa:cudnn"),
    "fa2": Peer("FlashAttention 2 (SDPA)", ("cuda",), "fagen.bench.sdpa:fa2"),
    "flash_attn": Peer("FlashAttention 2 (flash_attn)", ("cuda",), "fagen.bench.flash:load_flash_attn"),
    "fa3": Peer("FlashAttention 3", ("cuda",), "fagen.bench.flash:load_fa3"),
    "fa4": Peer("FlashAttention 4", ("cuda",), "fagen.bench.flash:load_fa4"),
    "flex": Peer("FlexAttention", ("cuda",), "fagen.bench.flex:load"),
    "flashinfer": Peer("FlashInfer", ("cuda",), "fagen.bench.flash:load_flashinfer"),
    "sdpa": Peer("SDPA, torch's choice", ("cuda", "cpu"), "fagen.bench.sdpa:sdpa"),
    "efficient": Peer("memory-efficient (SDPA)", ("cuda",), "fagen.bench.sdpa:efficient"),
    "math": Peer("math (SDPA)", ("cuda", "cpu"), "fagen.bench.sdpa:math"),
    "torch_softmax": Peer("torch.softmax", ("cuda", "cpu"), "fagen.bench.softmax:eager"),
    "compiled_softmax": Peer("softmax through torch.compile", ("cuda", "cpu"), "fagen.bench.softmax:compiled"),
}
_OF_SOFTMAX = ("torch_softmax", "compiled_softmax")  # the others are of attention
_ALL = {"cuda": ("cudnn", "fa2", "flash_attn", "fa3", "fa4", "flex", "flashinfer"), "cpu": ("sdpa",)}


def chosen(words: str, device: str, op: str = "forward") -> list[str]:
    """Names of peers of --peers: all, none or a list."""
    everyone = _OF_SOFTMAX if op == "softmax" else _ALL[device]
    names = [word.strip() for word in words.split(",") if word.strip()]
    if names in (["all"], ["none"]):
        return list(everyone) if names == ["all"] else []
    for name in names:
        if name not in PEERS:
            raise UsageError(f"peer {name!r} is unknown", f"known: {', '.join(PEERS)}, all, none")
        if (name in _OF_SOFTMAX) != (op == "softmax"):
            raise UsageError(f"peer {name} computes no {op}", f"of the softmax suite are: {', '.join(_OF_SOFTMAX)}")
    return list(dict.fromkeys(names))


def load(
    names: list[str], device: str, paths: Mapping[str, Path], op: str = "forward"
) -> tuple[dict[str, Loaded], dict[str, str]]:
    """The peers that are here, each prepared by what serves the op, and why each other one is not."""
    here: dict[str, Loaded] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            here[name] = _of_op(PEERS[name].load(device, paths), op)
        except Absent as error:
            absent[name] = str(error)
        except Exception as error:  # of its import: a version that does not fit, a library that is missing
            absent[name] = reason(error)
    return here, absent


def _of_op(loaded: Loaded, op: str) -> Loaded:
    if op == "softmax":
        return loaded
    if op == "forward":
        return replace(loaded, prepare=_verifiable(loaded.prepare))
    prepare = loaded.decode if op == "decode" else loaded.backward
    if isinstance(prepare, str):
        raise Absent(prepare)
    return replace(loaded, prepare=_verifiable(prepare))


def _verifiable(prepare: Prepare) -> Prepare:
    def checked(row: Row, inputs: Inputs) -> Serve:
        if row.problem.dropout:
            raise Cannot("it drops weights of its own choice: its output could not be verified")
        return prepare(row, inputs)

    return checked


def reason(error: BaseException) -> str:
    """The first line of what was raised."""
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, Absent | Cannot) else f"{type(error).__name__}: {text}"[:200]


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(row: Row, inputs: Inputs) -> Serve:
    """`fagen.attention` as a user calls it, dispatch and all, but for `out`, which a graph replay needs to stay."""
    from fagen import api

    if row.op == "backward":
        return _our_backward(inputs.call)
    if row.op == "decode":
        return _our_decode(inputs.call)
    if row.problem.dropout:
        return _our_dropout(inputs.call)
    given = options(row, inputs.call)
    return lambda i: api.attention(i.call.q, i.call.k, i.call.v, out=i.outputs["out"], **given)


def ours_eager(row: Row, inputs: Inputs) -> Serve:
    """The same with an output of its own, as the host time of a call counts it."""
    from fagen import api

    given = options(row, inputs.call)
    return lambda i: api.attention(i.call.q, i.call.k, i.call.v, **given)


def _our_backward(call: BackwardCall) -> Serve:
    """The kernel that dispatch picks, without autograd, as the peers are launched; else what PyTorch does instead."""
    from fagen.ops.attention import fallback

    made = _kernel(call)
    return launched(made) if made else lambda i: fallback.gradients(i.call.forward, i.call.dout, None)


def _our_decode(call: DecodeCall) -> Serve:
    """The kernel that dispatch picks; else PyTorch, as a call does it."""
    from fagen.ops.attention import decode_reference

    made = _kernel(call)
    return launched(made) if made else lambda i: decode_reference.attend(i.call, i.call.q.dtype)[0]


def _our_dropout(call: AttentionCall) -> Serve:
    """The kernel that dispatch picks, with the seed of the inputs, so that its output can be verified."""
    from fagen.ops.attention import fallback

    made = _kernel(call)
    return launched(made) if made else lambda i: fallback.attend(i.call)[0]


def _kernel(call: AttentionCall | DecodeCall) -> Kernel | None:
    from fagen.dispatch import resolve

    assert call.target is not None
    return resolve.kernel_for(call.problem, call.target)


def launched(made: Kernel) -> Serve:
    """A kernel, launched without dispatch: prepared once for each set of inputs."""
    from fagen.runtime.kernel import launcher

    names, calls = made.calls.timed, dict[int, Callable[[], object]]()

    def serve(i: Inputs) -> Any:
        if id(i) not in calls:
            calls[id(i)] = launcher(made, i)
        calls[id(i)]()
        return i.outputs[names[0]] if len(names) == 1 else tuple(i.outputs[name] for name in names)

    return serve


def choice(row: Row, inputs: Inputs) -> dict[str, Any]:
    """What dispatch picks for the row, and whether a kernel of ours really serves it."""
    from fagen import explanation
    from fagen.dispatch import attention
    from fagen.ops.attention.call import AttentionCall

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the result
        if row.op != "forward" or row.problem.dropout:
            call = inputs.call
            kernel = _kernel(call)
            found = explanation.explain_problem(call.problem, call.target)
        else:
            tensors = inputs.call.q, inputs.call.k, inputs.call.v
            given = {**options(row, inputs.call), "out": inputs.outputs["out"]}
            kernel = attention.kernel_of(AttentionCall.of(*tensors, **given))
            found = explanation.explain(*tensors, **given)
    report = found.to_dict()
    names = ("key", "family", "config", "provenance", "record", "facts")
    return {name: report[name] for name in names} | {"served_by": "kernel" if kernel is not None else "torch"}
