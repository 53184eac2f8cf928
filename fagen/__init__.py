"""fagen: attention kernels, generated for the machine at hand and tuned on it. Nothing happens at import."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "attention": "fagen.api",
    "warmup": "fagen.api",
    "tune": "fagen.tuner.call",
    "flash_attn_func": "fagen.compat.flash_attn",
    "sdpa": "fagen.compat.sdpa",
    "explain": "fagen.dispatch",
    "Problem": "fagen.problem",
    "Target": "fagen.target",
    "FagenError": "fagen.errors",
    "masks": "",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fagen' has no attribute {name!r}")
    from importlib import import_module

    where = _WHERE[name]
    value = getattr(import_module(where), name) if where else import_module(f"fagen.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
