"""PyTorch's scaled_dot_product_attention, by the backend that computes, and what has its signature."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.bench import decode_peers, fp8
from fagen.bench.autograd import steps, through_autograd
from fagen.bench.peers import Absent, Cannot, Held, Loaded, Prepare, Serve
from fagen.bench.rows import TRAINING, Inputs, Row
from fagen.ops.attention.inputs import DROPOUT

if TYPE_CHECKING:
    import torch


def cudnn(paths: Mapping[str, Path]) -> Loaded:
    import torch

    version = torch.backends.cudnn.version()
    if version is None:
        raise Absent("torch was built without cuDNN; torch for CUDA has it")
    found = _loaded("CUDNN_ATTENTION", str(version))
    return Loaded({**found.by_op, "forward_fp8": fp8.CUDNN}, found.version)


def fa2(paths: Mapping[str, Path]) -> Loaded:
    import torch

    return _loaded("FLASH_ATTENTION", f"torch {torch.__version__}")


def efficient(paths: Mapping[str, Path]) -> Loaded:
    import torch

    return _loaded("EFFICIENT_ATTENTION", f"torch {torch.__version__}")


def math(paths: Mapping[str, Path]) -> Loaded:
    import torch

    return _loaded("MATH", f"torch {torch.__version__}")


def sdpa(paths: Mapping[str, Path]) -> Loaded:
    import torch

    return _loaded("", f"torch {torch.__version__}")


def ffpa(paths: Mapping[str, Path]) -> Loaded:
    """FFPA, for head dims above 256: up to there it calls SDPA."""
    try:
        attend = importlib.import_module("ffpa_attn").ffpa_attn_func
    except ModuleNotFoundError as error:
        raise Absent(f"ffpa_attn cannot be imported: there is no {error.name}; pip install ffpa-attn") from error
    forward = _through_sdpa("", attend)

    def prepare(row: Row, inputs: Inputs) -> Serve:
        if reason := _not_by_ffpa(row):
            raise Cannot(reason)
        return forward(row, inputs)

    version = ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("ffpa-attn")
    return Loaded({"forward": prepare, "backward": through_autograd(prepare)}, version)


def _not_by_ffpa(row: Row) -> str | None:
    d, dv = row.problem.head_dim, row.problem.head_dim_v
    if d != dv:
        return f"q has head dim {d}, v {dv}: FFPA takes one for both"
    return f"up to head dim 256 FFPA calls SDPA, this is {d}" if d <= 256 else None


def _loaded(backend: str, version: str) -> Loaded:
    forward = _through_sdpa(backend)
    by_op = {"forward": forward, "backward": through_autograd(forward), TRAINING: steps(forward)}
    return Loaded(by_op if backend == "MATH" else {**by_op, "decode": decode_peers.by_sdpa(backend)}, version)


def _through_sdpa(backend: str, function: Callable[..., Any] | None = None) -> Prepare:
    """By SDPA's backend of that name, or a function that takes SDPA's arguments."""

    def prepare(row: Row, inputs: Inputs) -> Serve:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        p = row.problem
        if p.mask not in ("none", "causal") or p.softcap or p.alibi:
            raise Cannot("SDPA has no such mask or score but as a dense tensor")
        if p.mask == "causal" and p.seqlen_q != p.seqlen_k:
            raise Cannot("SDPA aligns causal top-left")
        attend = function or torch.nn.functional.scaled_dot_product_attention
        given = {"is_causal": p.mask == "causal", "enable_gqa": p.heads != p.kv_heads}
        given["dropout_p"] = DROPOUT if p.dropout else 0.0

        def serve(i: Inputs) -> torch.Tensor:
            return attend(*i.call.bhsd(), **given).transpose(1, 2)

        return Held(serve, (lambda: sdpa_kernel(getattr(SDPBackend, backend)),)) if backend else serve

    return prepare
