"""PyTorch's scaled_dot_product_attention, by the backend that computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fagen.bench import decode_peers, fp8
from fagen.bench.autograd import through_autograd
from fagen.bench.peers import Absent, Cannot, Loaded, Prepare, Serve
from fagen.bench.rows import Inputs, Row

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


def _loaded(backend: str, version: str) -> Loaded:
    forward = _through_sdpa(backend)
    by_op = {"forward": forward, "backward": through_autograd(forward)}
    return Loaded(by_op if backend == "MATH" else {**by_op, "decode": decode_peers.by_sdpa(backend)}, version)


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
