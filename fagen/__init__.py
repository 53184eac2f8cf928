"""fagen: attention kernels, generated for the machine at hand and tuned on it. Nothing happens at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # type checkers and editors see the names as they are
    from fagen.api import attention as attention
    from fagen.compat import hf as hf
    from fagen.compat.decode_plan import DecodePlan as DecodePlan
    from fagen.compat.flash_attn import flash_attn_func as flash_attn_func
    from fagen.compat.kvcache import flash_attn_with_kvcache as flash_attn_with_kvcache
    from fagen.compat.mla import mla_decode as mla_decode
    from fagen.compat.sdpa import sdpa as sdpa
    from fagen.compat.torch_impl import register_torch as register_torch
    from fagen.compat.varlen import flash_attn_varlen_func as flash_attn_varlen_func
    from fagen.dispatch.warmup import warmup as warmup
    from fagen.errors import FagenError as FagenError
    from fagen.explanation import explain as explain
    from fagen.fp8_api import quantize_qkv as quantize_qkv
    from fagen.ops.attention import masks as masks
    from fagen.ops.attention.decode_problem import DecodeProblem as DecodeProblem
    from fagen.ops.attention.merge import merge_states as merge_states
    from fagen.ops.attention.problem import Problem as Problem
    from fagen.ops.softmax.problem import SoftmaxProblem as SoftmaxProblem
    from fagen.ops.softmax.stats import merge_stats as merge_stats
    from fagen.ops.softmax.stats import softmax_stats as softmax_stats
    from fagen.softmax_api import log_softmax as log_softmax
    from fagen.softmax_api import softmax as softmax
    from fagen.target import Target as Target
    from fagen.tuner.call import tune as tune

__version__ = "0.1.0"

# Each public name and the module it is imported from at its first use; a test compares this with the imports above.
_WHERE = {
    "attention": "fagen.api",
    "quantize_qkv": "fagen.fp8_api",
    "softmax": "fagen.softmax_api",
    "log_softmax": "fagen.softmax_api",
    "softmax_stats": "fagen.ops.softmax.stats",
    "merge_stats": "fagen.ops.softmax.stats",
    "warmup": "fagen.dispatch.warmup",
    "tune": "fagen.tuner.call",
    "flash_attn_func": "fagen.compat.flash_attn",
    "flash_attn_varlen_func": "fagen.compat.varlen",
    "flash_attn_with_kvcache": "fagen.compat.kvcache",
    "mla_decode": "fagen.compat.mla",
    "merge_states": "fagen.ops.attention.merge",
    "sdpa": "fagen.compat.sdpa",
    "register_torch": "fagen.compat.torch_impl",
    "explain": "fagen.explanation",
    "DecodePlan": "fagen.compat.decode_plan",
    "DecodeProblem": "fagen.ops.attention.decode_problem",
    "Problem": "fagen.ops.attention.problem",
    "SoftmaxProblem": "fagen.ops.softmax.problem",
    "Target": "fagen.target",
    "FagenError": "fagen.errors",
    "masks": "fagen.ops.attention.masks",
    "hf": "fagen.compat.hf",
}

__all__ = ["__version__", *_WHERE]

if not TYPE_CHECKING:  # a checker that saw this would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _WHERE:
            raise AttributeError(f"module 'fagen' has no attribute {name!r}")
        from importlib import import_module

        module = import_module(_WHERE[name])
        value = globals()[name] = getattr(module, name, module)  # `masks` and `hf` are modules themselves
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
