"""Kernels on fp8 numbers in the tests: the configs and problems that they run, on the CPU's emulator and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fagen.families import Config, sm90_forward_fp8
from fagen.ops.attention import fallback, fp8_calls
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.fp8_call import Fp8Call
from fagen.ops.attention.fp8_problem import Fp8Problem
from fagen.ops.attention.fp8_quantize import QuantizedQKV, by_torch
from fagen.ops.attention.inputs import documents
from fagen.ops.oracle import Verdict
from tests.support.cases import DTYPES

FAMILY = sm90_forward_fp8.FAMILY
BASE: dict[str, Any] = {
    "tile_m": 128, "tile_n": 64, "stages": 2, "q_stages": 1, "overlap": "softmax", "rescale": "deferred",
    "promote": 0, "exp_on_fma": 0, "ping_pong": False, "blocks_per_sm": 1, "schedule": "balanced",
    "block_order": "ascending", "section_mb": 32,
}  # fmt: skip


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


# One config a line differs from BASE in what its name says; together they hold every value of every knob.
SCHEMES = {
    "base": config(),
    "turns": config(ping_pong=True, schedule="dynamic", promote=4),
    "every_tile": config(exp_on_fma=1, promote=1, tile_m=64, tile_n=96),
    "two_tiles": config(promote=2, tile_m=192, tile_n=32, rescale="each", ping_pong=True),
    "each": config(rescale="each", tile_n=128, q_stages=2, block_order="sectioned", section_mb=16),
    "serial": config(overlap="nothing", tile_m=192, tile_n=96, schedule="single", stages=1),
    "three_blocks": config(tile_m=64, tile_n=32, blocks_per_sm=3, schedule="single", block_order="longest_first"),
    "two_blocks": config(tile_m=64, tile_n=96, blocks_per_sm=2, stages=3, block_order="descending"),
    "deep": config(overlap="maxima", exp_on_fma=2, stages=4, tile_n=32, schedule="dynamic", block_order="sectioned"),
    "sections": config(q_stages=2, tile_n=160, schedule="dynamic", block_order="sectioned", section_mb=64),
    **{f"n{n}": config(tile_n=n, ping_pong=True) for n in (192, 224, 256)},
}


@dataclass(frozen=True)
class Case:
    """A kernel: static problem and config, and what else its calls have."""

    scheme: str
    mask: str = "causal"
    dtype: str = "bf16"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int = 0
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    magnitude: float = 1.0
    descales: bool = True
    block: int = 0
    intervals: str = ""
    changes: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def problem(self) -> Fp8Problem:
        return Fp8Problem(
            dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v, mask=self.mask,
            softcap=bool(self.softcap), intervals=self.intervals, scale_block=self.block,
        )  # fmt: skip

    @property
    def config(self) -> Config:
        return SCHEMES[self.scheme].replace(**dict(self.changes))

    def __str__(self) -> str:
        d = f"d{self.head_dim}" + (f"-{self.head_dim_v}" if self.head_dim_v else "")
        more = ["softcap"] * bool(self.softcap) + [f"x{self.magnitude:g}"] * (self.magnitude != 1)
        more += [] if self.descales else ["plain"]
        more += [self.intervals] * bool(self.intervals) + [f"scales{self.block}"] * bool(self.block)
        changes = (f"{k}={v}" for k, v in self.changes)
        return "-".join([self.scheme, self.mask, self.dtype, d, f"h{self.heads}-{self.kv_heads}", *more, *changes])


def make_call(case: Case, rows: int, keys: int, seed: int, *, batch: int, device: str, layout: str) -> Fp8Call:
    """Random numbers, larger from head to head and from batch to batch, so that no two have the same descale."""
    g = torch.Generator(device).manual_seed(seed)

    def tensor(length: int, heads: int, size: int) -> torch.Tensor:
        shape = (batch, length, heads, size)
        growth = 1 + torch.arange(batch, device=device)[:, None] + 0.5 * torch.arange(heads, device=device)
        made = torch.randn(shape, device=device, generator=g) * growth[:, None, :, None] ** 0.5 * case.magnitude
        return made if layout == "bshd" else made.transpose(1, 2)

    d, dv = case.head_dim, case.head_dim_v or case.head_dim
    tensors = tensor(rows, case.heads, d), tensor(keys, case.kv_heads, d), tensor(keys, case.kv_heads, dv)
    made = by_torch(*tensors, layout, bool(seed % 2), case.block)
    given = made if case.descales else (*made[:3], None, None, None, 0)
    band = (-1, 0) if case.mask == "causal" else case.window
    scale = None if case.descales else 2.0**-14
    return Fp8Call(
        *given, layout, band, case.softcap, scale, dtype=DTYPES[case.dtype], kind=case.intervals,
        intervals=_intervals(case, rows, keys, seed, batch).to(device) if case.intervals else None,
    )  # fmt: skip


def huge_scores(case: Case, rows: int, keys: int, top: int, *, device: str) -> Fp8Call:
    """Scores around 2^30, of which those of one key are far above the others: they round, and yet weights are known."""
    g = torch.Generator(device).manual_seed(top)
    q, k, v = (
        torch.rand((1, n, heads, case.head_dim), device=device, generator=g)
        for n, heads in ((rows, case.heads), (keys, case.kv_heads), (keys, case.kv_heads))
    )
    k[:, :top], k[:, top + 1 :] = k[:, :top] / 4, k[:, top + 1 :] / 4
    made = by_torch(1e4 * (1 + q), 1e4 * (1 + k), v - 0.5, "bshd", False, case.block)
    return Fp8Call(*made, dtype=DTYPES[case.dtype])


def _intervals(case: Case, rows: int, keys: int, seed: int, batch: int) -> torch.Tensor:
    """Documents, of each kv head others where the seed is odd."""
    heads = {"batch": batch, "heads": case.heads, "kv_heads": case.kv_heads}
    problem = case.problem.replace(**heads, seqlen_q=rows, seqlen_k=keys)
    return documents(problem, seed, varied=bool(seed % 2))


def run(
    case: Case, rows: int, keys: int, launch: Callable[..., Any], *, seed: int = 0, batch: int = 2,
    device: str = "cuda", layout: str = "bshd",
) -> Verdict:  # fmt: skip
    """Launch on fresh random inputs and poisoned outputs, and ask the oracle."""
    return judged(make_call(case, rows, keys, seed, batch=batch, device=device, layout=layout), launch)


def judged(call: Fp8Call, launch: Callable[..., Any]) -> Verdict:
    outputs = {
        name: torch.full(shape, torch.nan, dtype=dtype, device=call.q.device)
        for name, (shape, dtype) in call.output_types().items()
    }
    launch(call, outputs)
    return fp8_calls.check(call, outputs)


# ---- tensors of the tests of fagen.attention and fagen.quantize_qkv -------------------------------------------------


def qkv(layout: str = "bshd", d: int = 64, dv: int = 64, *, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((2, 50, 4, d), (2, 70, 2, d), (2, 70, 2, dv))
    made = [torch.randn(shape, generator=g).to(torch.bfloat16) for shape in shapes]
    return made if layout == "bshd" else [t.transpose(1, 2).contiguous() for t in made]


def named_descales(x: QuantizedQKV) -> dict[str, torch.Tensor]:
    return {name: getattr(x, name) for name in ("descale_q", "descale_k", "descale_v")}


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by PyTorch, in float32."""
    return fallback.attend(AttentionCall.of(q.float(), k.float(), v.float(), return_lse=True, **options))


def relative_error(mine: torch.Tensor, want: torch.Tensor) -> float:
    return float((mine.float() - want.float()).square().mean().sqrt() / want.float().square().mean().sqrt())
