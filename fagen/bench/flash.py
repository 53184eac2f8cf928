"""FlashAttention 2, 3 and 4 and FlashInfer, each by whatever way it is installed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.bench import decode_peers, flash_backward, flash_training, fp8, rows
from fagen.bench.autograd import steps, through_autograd
from fagen.bench.flash_arguments import document_arguments, fill, lengths, of_schema, packed, require, settings
from fagen.bench.peers import Absent, Cannot, Loaded, Prepare, Serve
from fagen.bench.rows import TRAINING, Inputs, Row

if TYPE_CHECKING:
    import torch

_WORKSPACE = 256 << 20  # bytes, FlashInfer's


def version_of(*packages: str) -> str:
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return ""


def imported(name: str, get: str) -> Any:
    """A module, or how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Absent(f"{name} cannot be imported: there is no {error.name}; {get}") from error


def _first(result: Any) -> torch.Tensor:
    """The output alone; versions differ in what they give beside it."""
    return result[0] if isinstance(result, tuple | list) else result


# ---- FlashAttention 3 -----------------------------------------------------------------------------------------------


def load_fa3(paths: Mapping[str, Path]) -> Loaded:
    """A library that the user names; else the package's own functions; else its op, where someone registered it."""
    import torch

    version = version_of("flash_attn_3", "flash-attn-3")
    if path := paths.get("fa3"):
        _load_library(path)
        return _fa3(path.name)
    if importlib.util.find_spec("flash_attn_interface"):
        module = importlib.import_module("flash_attn_interface")
        forward = _through_functions(module, unbounded=-1)
        return _fa3(version, forward, steps(forward))
    if hasattr(torch.ops.flash_attn_3, "fwd"):
        return _fa3(version)
    raise Absent(
        "flash_attn_interface cannot be imported, and --fa3 names no library; "
        "install the folder hopper of the flash-attention repository, or name its built _C.so"
    )


def _fa3(version: str, forward: Prepare | None = None, training: Prepare | None = None) -> Loaded:
    """Its ops, but for what its own functions do."""
    import torch

    ops, lacks = torch.ops.flash_attn_3, "it registers no op flash_attn_3::bwd"
    backward: Prepare | str = lacks
    if hasattr(ops, "bwd"):
        backward = flash_backward.through_op(ops.bwd.default)
        training = training or steps(flash_training.through_ops(ops.fwd.default, ops.bwd.default))
    forward = forward or _through_op(ops.fwd.default)
    by_op = {"forward": forward, "backward": backward, TRAINING: training or lacks, "decode": _fa3_decode()}
    by_op["forward_fp8"] = fp8.fa3()
    return Loaded(by_op, version)


def _fa3_decode() -> Prepare | str:
    import torch

    ops = torch.ops.flash_attn_3
    if not hasattr(ops, "fwd"):
        return "it registers no op flash_attn_3::fwd"
    plan = ops.get_scheduler_metadata.default if hasattr(ops, "get_scheduler_metadata") else None
    return decode_peers.through_fa3(ops.fwd.default, plan)


def _load_library(path: Path) -> None:
    import torch

    if not path.is_file():
        raise Absent(f"--fa3 {path} is no file")
    for runtime in sorted(path.parent.glob("libcudart.so.*")):  # of another CUDA version than torch's
        ctypes.CDLL(str(runtime.resolve()), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(path.resolve()))
    if not hasattr(torch.ops.flash_attn_3, "fwd"):
        raise Absent(f"{path.name} registers no op flash_attn_3::fwd")


def _through_op(op: Any) -> Prepare:
    def prepare(row: Row, inputs: Inputs) -> Serve:
        require(row)
        wanted = {**settings(row, -1), **document_arguments(row, inputs.call.q.device)}
        fixed = fill(of_schema(op._schema), wanted)
        if not row.documents:
            return lambda i: _first(op(q=i.call.q, k=i.call.k, v=i.call.v, **fixed))

        def serve(i: Inputs) -> torch.Tensor:
            q, k, v = packed(i)
            return _first(op(q=q, k=k, v=v, **fixed)).view_as(i.outputs["out"])

        return serve

    return prepare


# ---- functions named flash_attn_func and flash_attn_varlen_func -----------------------------------------------------


def _through_functions(module: Any, unbounded: int | None) -> Prepare:
    def prepare(row: Row, inputs: Inputs) -> Serve:
        require(row)
        s = settings(row, unbounded)
        given = {"causal": s["causal"], "window_size": (s["window_left"], s["window_right"]), "softcap": s["softcap"]}
        if rows.deterministic(row.problem):
            given["deterministic"] = True
        if not row.documents:
            call = module.flash_attn_func
            return lambda i: _first(call(i.call.q, i.call.k, i.call.v, **given))
        varlen, given = module.flash_attn_varlen_func, given | document_arguments(row, inputs.call.q.device)

        def serve(i: Inputs) -> torch.Tensor:
            return _first(varlen(*packed(i), **given)).view_as(i.outputs["out"])

        return serve

    return prepare


def load_flash_attn(paths: Mapping[str, Path]) -> Loaded:
    """The package of FlashAttention 2; FlashAttention 4's shares its name, and lacks these functions."""
    module = imported("flash_attn.flash_attn_interface", "pip install flash-attn --no-build-isolation")
    forward = _through_functions(module, unbounded=-1)
    by_op = {"forward": forward, "backward": through_autograd(forward), TRAINING: steps(forward)}
    return Loaded(by_op, version_of("flash-attn", "flash_attn"))


def add_wheels(folder: Path, package: str) -> None:
    """`--fa4 DIR` is a folder of unpacked wheels, `package` and the CUTLASS DSL among them."""
    if not (folder / package).is_dir():
        raise Absent(f"--fa4 {folder} holds no {package}")
    inside = folder / "nvidia_cutlass_dsl"
    more = [inside / name for name in ("dsl_packages", "python_packages") if (inside / name).is_dir()]
    sys.path[:0] = [str(path.resolve()) for path in (folder, *more)]
    importlib.invalidate_caches()


def load_fa4(paths: Mapping[str, Path]) -> Loaded:
    if folder := paths.get("fa4"):
        add_wheels(folder, "flash_attn/cute")
        if two := sys.modules.get("flash_attn"):  # FlashAttention 2's package, which looks into its own folder alone
            two.__path__.append(str((folder / "flash_attn").resolve()))
    module = imported("flash_attn.cute.interface", "pip install flash-attn-4, or --fa4 names a folder of its wheels")
    backward: Prepare | str = f"{module.__name__} has no _flash_attn_bwd"
    if function := getattr(module, "_flash_attn_bwd", None):
        backward = flash_backward.through_function(function)
    forward = _through_functions(module, unbounded=None)
    by_op = {"forward": forward, "backward": backward, TRAINING: steps(forward)}
    return Loaded(by_op, version_of("flash-attn-4", "flash_attn_cute"))


# ---- FlashInfer -----------------------------------------------------------------------------------------------------


def load_flashinfer(paths: Mapping[str, Path]) -> Loaded:
    module = imported("flashinfer", "pip install flashinfer-python")
    by_op: dict[str, Prepare | str] = {
        "forward": through_flashinfer(module), "decode": decode_peers.through_flashinfer(module)
    }  # fmt: skip
    return Loaded(by_op, version_of("flashinfer-python"))


def through_flashinfer(flashinfer: Any) -> Prepare:
    """One sequence by its function for one, several or packed documents by its ragged prefill."""

    def prepare(row: Row, inputs: Inputs) -> Serve:
        require(row)
        p = row.problem
        if p.window_right > 0 or (p.window_left >= 0 and not row.causal):
            raise Cannot("it has no window right of the diagonal")
        given: dict[str, Any] = {
            "causal": row.causal, "window_left": p.window_left, "logits_soft_cap": inputs.call.softcap or None
        }  # fmt: skip
        if p.batch == 1 and not row.documents:
            single = functools.partial(flashinfer.single_prefill_with_kv_cache, kv_layout="NHD", **given)
            return lambda i: single(i.call.q[0], i.call.k[0], i.call.v[0])[None]
        wrapper = _planned(flashinfer, row, inputs, given)
        return lambda i: wrapper.run(*packed(i)).view_as(i.outputs["out"])

    return prepare


def _planned(flashinfer: Any, row: Row, inputs: Inputs, given: dict[str, Any]) -> Any:
    """Its ragged prefill; the plan is made ahead, as its users make it once for all layers."""
    import torch

    p, device = row.problem, inputs.call.q.device
    if row.documents:
        of_q = of_k = lengths(row, device)
    else:
        step = torch.arange(p.batch + 1, dtype=torch.int32, device=device)
        of_q, of_k = step * p.seqlen_q, step * p.seqlen_k
    workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        of_q, of_k, p.heads, p.kv_heads, p.head_dim, head_dim_vo=p.head_dim_v, q_data_type=inputs.call.q.dtype, **given
    )  # fmt: skip
    return wrapper
