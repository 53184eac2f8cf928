"""How accurate attention on fp8 numbers is: errors against float64, with and without each measure that fagen takes.

    python benchmarks/fp8_accuracy.py                        tables for people, on the CPU by emulation
    python benchmarks/fp8_accuracy.py --keys 131072 --json   longer contexts, as JSON

Emulated are the tensor cores' products of e4m3: sums of 14 bits, cut after every 32 products. On a Hopper GPU the
kernel of `fagen.attention` itself takes part, and with --fa3 FILE FlashAttention 3's.

Inputs: `gaussian`, N(0, 1); `outliers`, N(0, 1) + N(0, 100) · Bernoulli(0.001), as in FlashAttention 3's paper;
`needle`, many keys of which one has most of a row's weight, and values around 1, as long contexts have common parts.
Errors are those of several draws together.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fagen.ops.attention.fp8_quantize import LARGEST, spread_outliers

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k and v: (heads, rows or keys, d)
STEP = 32  # products that wgmma adds up at once
TILE = 128  # keys of a tile
BLOCK = 128  # rows that share a scale, of blocks
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Measures:
    """What keeps errors small."""

    incoherent: bool = True  # random-sign Hadamard of q and k
    scales: str = "head"  # "tensor": one for all heads; "block": one for each BLOCK rows of q and of k
    weight_scale: float = 256.0  # of the largest weight that there may be, in e4m3
    slack: float = 0.0  # powers of two by which a maximum may grow before O follows; no kernel has any
    promote: int = 1  # tiles whose sums leave the tensor cores at once; 0: all


METHODS = {
    "fp8, one scale a tensor, no measure": Measures(False, "tensor", 1.0, 0.0, 0),
    "fagen fp8": Measures(),
    "  without incoherent processing": Measures(incoherent=False),
    "  with one scale a tensor": Measures(scales="tensor"),
    "  with scales of blocks": Measures(scales="block"),
    "  with scales of blocks alone": Measures(incoherent=False, scales="block"),
    "  without scaling the weights": Measures(weight_scale=1.0),
    "  slack=2": Measures(slack=2.0),
    "  slack=4": Measures(slack=4.0),
    "  promote=2": Measures(promote=2),
    "  promote=4": Measures(promote=4),
    "  promote=0": Measures(promote=0),
}


# ---- inputs ----------------------------------------------------------------------------------------------------------


def gaussian(heads: int, rows: int, keys: int, d: int, g: torch.Generator) -> Tensors:
    q, k, v = (torch.randn(heads, n, d, generator=g) for n in (rows, keys, keys))
    return q, k, v


def outliers(heads: int, rows: int, keys: int, d: int, g: torch.Generator) -> Tensors:
    def tensor(n: int) -> torch.Tensor:
        rare = torch.rand(heads, n, d, generator=g) < 0.001
        return torch.randn(heads, n, d, generator=g) + 10 * torch.randn(heads, n, d, generator=g) * rare

    return tensor(rows), tensor(keys), tensor(keys)


def needle(heads: int, rows: int, keys: int, d: int, g: torch.Generator) -> Tensors:
    """All rows look for one key, whose weight is e^2 times that of all others together."""
    q, k, v = gaussian(heads, rows, keys, d, g)
    q = q[:, :1] + 0.3 * q
    at = int(torch.randint(keys, (1,), generator=g))
    along = q[:, 0] / q[:, 0].norm(dim=-1, keepdim=True)
    others = float((q[:, 0, None] @ k.mT / math.sqrt(d)).logsumexp(-1).mean())
    k[:, at] = along * (others + 2) * math.sqrt(d) / q[:, 0].norm(dim=-1, keepdim=True)
    return q, k, v + 1


INPUTS: dict[str, Callable[..., Tensors]] = {"gaussian": gaussian, "outliers": outliers, "needle": needle}


# ---- attention -------------------------------------------------------------------------------------------------------


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def in_bf16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As a kernel does it: products of bf16 added up in float32, weights of bf16."""
    q, k, v = (t.bfloat16().float() for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return ((weights.bfloat16().float() @ v) / weights.sum(-1, keepdim=True)).bfloat16()


def cut(x: torch.Tensor) -> torch.Tensor:
    """To 14 bits, towards 0."""
    return (x.contiguous().view(torch.int32) & ~0x3FF).view(torch.float32)


def multiply(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """start + a b as the tensor cores add it up."""
    total = torch.zeros(*a.shape[:-1], b.shape[-1]) if start is None else start
    for first in range(0, a.shape[-1], STEP):
        total = cut(total + a[..., first : first + STEP] @ b[..., first : first + STEP, :])
    return total


def quantized(t: torch.Tensor, scales: str) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers, and what multiplies each: one number, one a head, or one a row."""
    if scales == "block":
        of_rows = t.abs().amax(-1)
        padded = torch.nn.functional.pad(of_rows, (0, -t.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        largest = padded.amax(-1).repeat_interleave(BLOCK, dim=1)[:, : t.shape[1], None]
    else:
        largest = t.abs().amax((-1, -2), keepdim=True) if scales == "head" else t.abs().amax()
    scale = largest / LARGEST
    return (t / scale).clamp(-LARGEST, LARGEST).to(E4M3).float(), scale


def in_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: Measures) -> torch.Tensor:
    """As sm90_forward_fp8 does it, tile by tile."""
    if m.incoherent:
        q, k = spread_outliers(q), spread_outliers(k)
    (q, of_q), (k, of_k) = (quantized(t, m.scales) for t in (q, k))
    v, of_v = quantized(v, "head" if m.scales == "block" else m.scales)
    scale = of_q * (of_k.mT if of_k.dim() else of_k) / math.sqrt(q.shape[-1])
    top = torch.full((*q.shape[:2], 1), -math.inf)  # what is subtracted from a row's scores
    slack, weight_scale = m.slack * math.log(2), m.weight_scale / 2**m.slack
    total, out, recent, held = torch.zeros_like(top), torch.zeros(*q.shape[:2], v.shape[-1]), None, 0
    for first in range(0, k.shape[1], TILE):
        tile = slice(first, first + TILE)
        scores = multiply(q, k[:, tile].mT) * (scale[..., tile] if m.scales == "block" else scale)
        most = scores.amax(-1, keepdim=True)
        grown = torch.where(most > top + slack, most, top)
        factor, top = torch.exp(top - grown), grown
        weights = torch.exp(scores - top)
        total, out = total * factor + weights.sum(-1, keepdim=True), out * factor
        recent = None if recent is None else recent * factor
        rounded = (weights * weight_scale).to(E4M3).float() / weight_scale
        recent, held = multiply(rounded, v[:, tile], recent), held + 1
        if held == m.promote:
            out, recent, held = out + recent, None, 0
    return ((out if recent is None else out + recent) * of_v / total).bfloat16()


def on_gpu(fa3: Path | None) -> dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]]:
    """What runs on a Hopper GPU: our kernel, and FlashAttention 3's by its op."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return {}
    import fagen
    from fagen.bench import flash
    from fagen.ops.attention.fp8_order import rows_of_values

    def moved(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.cuda().transpose(0, 1)[None].contiguous() for t in tensors]  # (1, rows, heads, d)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        x = fagen.quantize_qkv(*moved(q, k, v))
        out = fagen.attention(x.q, x.k, x.v, descale_q=x.descale_q, descale_k=x.descale_k, descale_v=x.descale_v)
        return out[0].transpose(0, 1).cpu()

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        x = fagen.quantize_qkv(*moved(q, k, v), incoherent=False)
        given = {f"{name}_descale": getattr(x, f"descale_{name}") for name in "qkv"}
        found = torch.ops.flash_attn_3.fwd(q=x.q, k=x.k, v=rows_of_values(x.v, k.shape[1]), **given)
        return (found[0] if isinstance(found, tuple | list) else found)[0].transpose(0, 1).cpu()

    found = {"fagen fp8, the kernel": ours}
    if fa3 is not None:
        flash.load_fa3({"fa3": fa3})
        found["FlashAttention 3 fp8"] = theirs
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def errors(out: torch.Tensor, want: torch.Tensor) -> dict[str, float]:
    error = (out.double() - want).abs()
    return {"rmse": float(error.square().mean().sqrt()), "largest": float(error.max())}


def measure(
    name: str, heads: int, rows: int, keys: int, d: int, *, draws: int = 1, fa3: Path | None = None
) -> dict[str, dict[str, float]]:
    """The errors of each method on one kind of inputs."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(draws):
        q, k, v = INPUTS[name](heads, rows, keys, d, torch.Generator().manual_seed(seed))
        want = exact(q, k, v)
        made = {"bf16": in_bf16(q, k, v)}
        made |= {method: in_fp8(q, k, v, measures) for method, measures in METHODS.items()}
        made |= {method: call(q, k, v) for method, call in on_gpu(fa3).items()}
        for method, out in made.items():
            found.setdefault(method, []).append(errors(out, want))
    return {method: pooled(several) for method, several in found.items()}


def pooled(several: list[dict[str, float]]) -> dict[str, float]:
    square = sum(error["rmse"] ** 2 for error in several) / len(several)
    return {"rmse": math.sqrt(square), "largest": max(error["largest"] for error in several)}


def table(title: str, found: dict[str, dict[str, float]]) -> str:
    base = found["fp8, one scale a tensor, no measure"]["rmse"]
    lines = [f"| {title} | RMSE | largest error | RMSE of fp8 without measures over it |", "|---|---|---|---|"]
    for method, error in found.items():
        name = method.replace("  ", "&nbsp;&nbsp;")
        lines.append(f"| {name} | {error['rmse']:.2e} | {error['largest']:.2e} | {base / error['rmse']:.2f} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--short", type=int, default=8192, help="keys of gaussian and outliers")
    parser.add_argument("--keys", type=int, default=32768, help="keys of the needle's context")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--fa3", type=Path, help="library of FlashAttention 3, on a Hopper GPU")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(words)
    found: dict[str, Any] = {}
    for name in INPUTS:
        long = name == "needle"
        keys, rows = (args.keys, min(args.rows, 16)) if long else (args.short, args.rows)
        title = f"{name}, {keys} keys, d{args.head_dim}"
        found[title] = measure(name, args.heads, rows, keys, args.head_dim, draws=args.draws, fa3=args.fa3)
        if not args.json:
            print(table(title, found[title]), end="\n\n", flush=True)
    if args.json:
        print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
