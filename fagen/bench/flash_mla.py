"""FlashMLA on a latent cache: its own package, or its copy in SGLang's kernels."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.bench.decode_peers import once, scale_of
from fagen.bench.flash import version_of
from fagen.bench.peers import Absent, Cannot, Loaded, Prepare, Serve
from fagen.bench.rows import Inputs, Row

if TYPE_CHECKING:
    from fagen.bench.decode_peers import Run
    from fagen.ops.attention.decode_call import DecodeCall

_PAGE = 64  # rows of the pages that it has


def load(paths: Mapping[str, Path]) -> Loaded:
    for name, package in (("flash_mla", "flash_mla"), ("sgl_kernel.flash_mla", "sgl_kernel")):
        if importlib.util.find_spec(package):
            try:
                module = importlib.import_module(name)
            except (ImportError, OSError) as error:  # a library of another torch or CUDA
                raise Absent(f"{name} cannot be imported: {str(error).splitlines()[0]}") from error
            return Loaded({"decode": through(module)}, version_of("sgl-flash-mla", "flash-mla", "sgl-kernel"))
    raise Absent("flash_mla cannot be imported; pip install sgl-flash-mla --no-deps, or build FlashMLA's repository")


def through(module: Any) -> Prepare:
    """Its function for paged caches; what its scheduler plans is planned before the clock runs."""

    def prepare(row: Row, inputs: Inputs) -> Serve:
        _require(inputs.call)
        return once(lambda call: _planned(module, call))

    return prepare


def _require(call: DecodeCall) -> None:
    if not call.shared_kv or call.page != _PAGE:
        raise Cannot(f"it has caches alone whose values are columns of the keys, in pages of {_PAGE}")
    if call.k.dtype != call.q.dtype or call.sinks is not None or call.softcap or call.ragged:
        raise Cannot("it takes q of one length on a cache of its dtype, without sinks and softcap")
    if call.window not in ((-1, -1), (-1, 0)):
        raise Cannot("it has no windows")


def _planned(module: Any, call: DecodeCall) -> Run:
    attend = module.flash_mla_with_kvcache
    plan = module.get_mla_metadata(call.seqlens_k, call.seqlen_q * call.heads // call.kv_heads, call.kv_heads)
    given: dict[str, Any] = {"softmax_scale": scale_of(call), "causal": call.window[1] == 0}
    if "use_legacy" in inspect.signature(attend).parameters:
        given["use_legacy"] = True  # where a version keeps its kernels for Hopper
    words = call.q, call.k, call.page_table, call.seqlens_k, call.v.shape[3], *plan

    def run() -> Any:
        return attend(*words, **given)[0]

    run()  # some versions plan in their first call
    return run
