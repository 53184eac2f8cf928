"""Attention layers of well-known models, since people think in models: `fagen tune --preset llama3-8b,gemma3-4b`.

From the models' public configs. A model whose layers are of several kinds gives a problem for each kind; lengths,
batch and dtype come from the flags. Where fagen lacks what a model's layers do, `lacks` says it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from fagen.errors import UsageError


@dataclass(frozen=True)
class Preset:
    heads: int
    kv_heads: int
    head_dim: str  # as --head-dim spells it
    window: int = 0  # keys that a local layer sees, the row's own among them; 0: there are no local layers
    kinds: tuple[str, ...] = ("causal",)  # causal, local, full
    softcap: bool = False
    lacks: str = ""

    def layers(self) -> dict[str, dict[str, Any]]:
        """Problem settings by kind of layer."""
        shape = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        shape |= {"softcap": True} if self.softcap else {}
        masks: dict[str, dict[str, Any]] = {
            "causal": {"mask": "causal"},
            "local": {"mask": "window", "window": f"{self.window - 1},0"},
            "full": {"mask": "none"},
        }
        return {kind: shape | masks[kind] for kind in self.kinds}


_BOTH = ("causal", "local")
_SINKS = "a learned sink in each row's softmax"

PRESETS: dict[str, Preset] = {
    "bert-base": Preset(12, 12, "64", kinds=("full",)),
    "bert-large": Preset(16, 16, "64", kinds=("full",)),
    "vit-l": Preset(16, 16, "64", kinds=("full",)),
    "whisper-large-v3": Preset(20, 20, "64", kinds=("full", "causal")),
    "flux1-dev": Preset(24, 24, "128", kinds=("full",)),
    "gpt2": Preset(12, 12, "64"),
    "gpt2-xl": Preset(25, 25, "64"),
    "falcon-7b": Preset(71, 1, "64"),
    "llama2-7b": Preset(32, 32, "128"),
    "llama2-13b": Preset(40, 40, "128"),
    "llama2-70b": Preset(64, 8, "128"),
    "llama3-8b": Preset(32, 8, "128"),
    "llama3-70b": Preset(64, 8, "128"),
    "llama3.1-405b": Preset(128, 8, "128"),
    "llama3.2-1b": Preset(32, 8, "64"),
    "llama3.2-3b": Preset(24, 8, "128"),
    "mistral-7b-v0.1": Preset(32, 8, "128", 4096, ("local",)),
    "mistral-7b-v0.3": Preset(32, 8, "128"),
    "mixtral-8x7b": Preset(32, 8, "128"),
    "qwen2.5-0.5b": Preset(14, 2, "64"),
    "qwen2.5-7b": Preset(28, 4, "128"),
    "qwen2.5-32b": Preset(40, 8, "128"),
    "qwen2.5-72b": Preset(64, 8, "128"),
    "qwen3-0.6b": Preset(16, 8, "128"),
    "qwen3-4b": Preset(32, 8, "128"),
    "qwen3-8b": Preset(32, 8, "128"),
    "qwen3-14b": Preset(40, 8, "128"),
    "qwen3-32b": Preset(64, 8, "128"),
    "qwen3-30b-a3b": Preset(32, 4, "128"),
    "gemma2-2b": Preset(8, 4, "256", 4096, _BOTH, softcap=True),
    "gemma2-9b": Preset(16, 8, "256", 4096, _BOTH, softcap=True),
    "gemma2-27b": Preset(32, 16, "128", 4096, _BOTH, softcap=True),
    "gemma3-1b": Preset(4, 1, "256", 512, _BOTH),
    "gemma3-4b": Preset(8, 4, "256", 1024, _BOTH),
    "gemma3-12b": Preset(16, 8, "256", 1024, _BOTH),
    "gemma3-27b": Preset(32, 16, "128", 1024, _BOTH),
    "gpt-oss-20b": Preset(64, 8, "64", 128, _BOTH, lacks=_SINKS),
    "gpt-oss-120b": Preset(64, 8, "64", 128, _BOTH, lacks=_SINKS),
    "phi4": Preset(40, 10, "128"),
    "smollm2-1.7b": Preset(32, 32, "64"),
    "smollm3-3b": Preset(16, 4, "128"),
    "deepseek-v3": Preset(128, 128, "192-128"),
}


def get(name: str) -> Preset:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=4, cutoff=0.4)
        raise UsageError(
            f"preset {name!r} is unknown",
            f"close: {', '.join(near)}" if near else "",
            "fagen tune --list-presets shows all",
        )
    return PRESETS[name]


def table() -> str:
    """A line a preset, for people."""
    rows = [("preset", "heads", "kv heads", "head dim", "layers")]
    for name, p in PRESETS.items():
        kinds = ", ".join(f"local {p.window}" if kind == "local" else kind for kind in p.kinds)
        more = (", softcap" if p.softcap else "") + (f"; without {p.lacks}" if p.lacks else "")
        rows.append((name, str(p.heads), str(p.kv_heads), p.head_dim, kinds + more))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows)
