"""The peers: what each needs, and how it is called on a row's inputs. All take and give (batch, seqlen, heads, dim).

A peer's `load` raises `Absent` where it is not installed. It gives `prepare`, which raises (`Cannot`, or whatever the
peer itself raises) for a row that the peer does not serve, and gives a function from inputs to the output.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.bench.rows import Inputs, Row, options
from fagen.errors import UsageError

if TYPE_CHECKING:
    import torch

OURS = "fagen"
Serve = Callable[[Inputs], "torch.Tensor"]
Prepare = Callable[[Row, Inputs], Serve]


class Absent(Exception):
    """The peer is not here; the message says what is missing."""


class Cannot(Exception):
    """The peer has no way to compute the row."""


@dataclass(frozen=True)
class Loaded:
    prepare: Prepare
    version: str = ""


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
    "cudnn": Peer("cuDNN (SDPA)", ("cuda",), "fagen.bench.peers:load_cudnn"),
    "fa2": Peer("FlashAttention 2 (SDPA)", ("cuda",), "fagen.bench.peers:load_fa2"),
    "flash_attn": Peer("FlashAttention 2 (flash_attn)", ("cuda",), "fagen.bench.flash:load_flash_attn"),
    "fa3": Peer("FlashAttention 3", ("cuda",), "fagen.bench.flash:load_fa3"),
    "fa4": Peer("FlashAttention 4", ("cuda",), "fagen.bench.flash:load_fa4"),
    "flex": Peer("FlexAttention", ("cuda",), "fagen.bench.flex:load"),
    "flashinfer": Peer("FlashInfer", ("cuda",), "fagen.bench.flash:load_flashinfer"),
    "sdpa": Peer("SDPA, torch's choice", ("cuda", "cpu"), "fagen.bench.peers:load_sdpa"),
    "efficient": Peer("memory-efficient (SDPA)", ("cuda",), "fagen.bench.peers:load_efficient"),
    "math": Peer("math (SDPA)", ("cuda", "cpu"), "fagen.bench.peers:load_math"),
}
_ALL = {"cuda": ("cudnn", "fa2", "flash_attn", "fa3", "fa4", "flex", "flashinfer"), "cpu": ("sdpa",)}


def chosen(words: str, device: str) -> list[str]:
    """Names of peers of --peers: all, none or a list."""
    names = [word.strip() for word in words.split(",") if word.strip()]
    if names in (["all"], ["none"]):
        return list(_ALL[device]) if names == ["all"] else []
    for name in names:
        if name not in PEERS:
            raise UsageError(f"peer {name!r} is unknown", f"known: {', '.join(PEERS)}, all, none")
    return list(dict.fromkeys(names))


def load(names: list[str], device: str, paths: Mapping[str, Path]) -> tuple[dict[str, Loaded], dict[str, str]]:
    """The peers that are here, and why each other one is not."""
    here: dict[str, Loaded] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            here[name] = PEERS[name].load(device, paths)
        except Absent as error:
            absent[name] = str(error)
        except Exception as error:  # of its import: a version that does not fit, a library that is missing
            absent[name] = reason(error)
    return here, absent


def reason(error: BaseException) -> str:
    """The first line of what was raised."""
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, Absent | Cannot) else f"{type(error).__name__}: {text}"[:200]


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(row: Row, inputs: Inputs) -> Serve:
    """`fagen.attention` as a user calls it, dispatch and all, but for `out`, which a graph replay needs to stay."""
    from fagen import api

    given = options(row, inputs.call)
    return lambda i: api.attention(i.call.q, i.call.k, i.call.v, out=i.outputs["out"], **given)


def ours_eager(row: Row, inputs: Inputs) -> Serve:
    """The same with an output of its own, as the host time of a call counts it."""
    from fagen import api

    given = options(row, inputs.call)
    return lambda i: api.attention(i.call.q, i.call.k, i.call.v, **given)


def choice(row: Row, inputs: Inputs) -> dict[str, Any]:
    """What dispatch picks for the row, and whether a kernel of ours really serves it."""
    import warnings

    from fagen import explanation
    from fagen.dispatch import attention
    from fagen.ops.attention.call import AttentionCall

    tensors = inputs.call.q, inputs.call.k, inputs.call.v
    given = {**options(row, inputs.call), "out": inputs.outputs["out"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said in the result
        kernel = attention.kernel_of(AttentionCall.of(*tensors, **given))
    report = explanation.explain(*tensors, **given).to_dict()
    names = ("key", "family", "config", "provenance", "record", "facts")
    return {name: report[name] for name in names} | {"served_by": "kernel" if kernel is not None else "torch"}


# ---- through scaled_dot_product_attention ---------------------------------------------------------------------------


def load_cudnn(paths: Mapping[str, Path]) -> Loaded:
    import torch

    version = torch.backends.cudnn.version()
    if version is None:
        raise Absent("torch was built without cuDNN; torch for CUDA has it")
    return Loaded(_through_sdpa("CUDNN_ATTENTION"), str(version))


def load_fa2(paths: Mapping[str, Path]) -> Loaded:
    import torch

    return Loaded(_through_sdpa("FLASH_ATTENTION"), f"torch {torch.__version__}")


def load_efficient(paths: Mapping[str, Path]) -> Loaded:
    import torch

    return Loaded(_through_sdpa("EFFICIENT_ATTENTION"), f"torch {torch.__version__}")


def load_math(paths: Mapping[str, Path]) -> Loaded:
    import torch

    return Loaded(_through_sdpa("MATH"), f"torch {torch.__version__}")


def load_sdpa(paths: Mapping[str, Path]) -> Loaded:
    import torch

    return Loaded(_through_sdpa(""), f"torch {torch.__version__}")


def _through_sdpa(backend: str) -> Prepare:
    def prepare(row: Row, inputs: Inputs) -> Serve:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        p = row.problem
        if p.mask not in ("none", "causal") or p.softcap or p.alibi:
            raise Cannot("SDPA has no such mask or score but as a dense tensor")
        if p.mask == "causal" and p.seqlen_q != p.seqlen_k:
            raise Cannot("SDPA aligns causal top-left")
        causal, shared = p.mask == "causal", p.heads != p.kv_heads
        attend = torch.nn.functional.scaled_dot_product_attention

        def serve(i: Inputs) -> torch.Tensor:
            q, k, v = i.call.bhsd()
            return attend(q, k, v, is_causal=causal, enable_gqa=shared).transpose(1, 2)

        def held(i: Inputs) -> torch.Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return serve(i)

        return held if backend else serve

    return prepare
