"""What the GPU tests run: problems and the configs that compute them, known ahead so that all are built in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from fagen import target
from fagen.codegen.spec import KernelSpec
from fagen.families import Config, Family, sm80_forward, sm90_forward, sm90_forward_large
from fagen.ops.attention import reference
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.problem import Problem
from fagen.runtime import kernel
from fagen.runtime.kernel import Kernel

FAMILY = sm80_forward.FAMILY
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BASE: dict[str, Any] = {
    "tile_m": 64, "tile_n": 32, "warps": 4, "partition": "split_q", "loop_order": "q_outer", "stages": 2,
    "overlap": False, "q_source": "shared", "smem_layout": "swizzled", "blocks_per_sm": 1, "rescale": "deferred",
    "block_order": "ascending",
}  # fmt: skip


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


# One config a line differs from BASE in what its name says; together they hold every value of every knob.
SCHEMES = {
    "base": config(),
    "one_stage": config(stages=1),
    "three_stages": config(stages=3),
    "q_in_registers": config(q_source="registers", stages=1, blocks_per_sm=2),
    "rescale_each": config(rescale="each", blocks_per_sm=3),
    "padded": config(smem_layout="padded", blocks_per_sm=4),
    "overlap": config(overlap=True),
    "overlap_deep": config(overlap=True, stages=3, q_source="registers", rescale="each"),
    "descending": config(block_order="descending"),
    "longest_first": config(block_order="longest_first"),
    "sectioned": config(block_order="sectioned"),
    "kv_outer": config(loop_order="kv_outer", stages=1),
    "kv_outer_registers": config(loop_order="kv_outer", stages=1, q_source="registers", rescale="each"),
    "split_k": config(partition="split_k", tile_m=16, tile_n=64),
    "split_k_overlap": config(partition="split_k", tile_m=32, tile_n=128, overlap=True),
    "split_k_kv_outer": config(partition="split_k", tile_m=16, tile_n=64, loop_order="kv_outer", stages=1),
    "pairs": config(partition="pairs", tile_n=64, smem_layout="padded"),
    "pairs_one_stage": config(partition="pairs", tile_m=128, warps=8, stages=1, smem_layout="padded", rescale="each"),
    "one_warp": config(tile_m=16, tile_n=16, warps=1),
    "two_warps": config(tile_m=64, tile_n=48, warps=2),
    "eight_warps": config(tile_m=256, tile_n=80, warps=8, q_source="registers"),
    "wide": config(tile_m=192, tile_n=48, warps=4),
    "tall": config(tile_m=128, tile_n=96, warps=8, stages=1),
    "split": config(splits="keys"),
    "split_overlap": config(splits="keys", overlap=True, tile_m=32, warps=2, block_order="longest_first"),
    "split_one_stage": config(splits="keys", stages=1, tile_m=128, tile_n=48, q_source="registers"),
}


HOPPER = sm90_forward.FAMILY
BASE_90: dict[str, Any] = {
    "tile_m": 128, "tile_n": 64, "stages": 2, "q_stages": 1, "overlap": True, "rescale": "deferred", "ping_pong": False,
    "blocks_per_sm": 1, "schedule": "balanced", "block_order": "ascending", "section_mb": 32,
    "cluster": 1, "shared_weights": False, "pack_heads": False,
}  # fmt: skip

# Values in the order of BASE_90: whatever two of them can go together do so in some line.
_MIXED = (
    (64, 32, 3, 1, True, "each", False, 3, "balanced", "descending", 32, 1, True, True),
    (64, 80, 1, 1, True, "each", False, 3, "single", "sectioned", 32, 1, True, False),
    (64, 48, 2, 1, False, "deferred", False, 3, "dynamic", "longest_first", 32, 1, False, False),
    (64, 64, 1, 2, False, "deferred", False, 3, "dynamic", "ascending", 32, 1, True, True),
    (64, 96, 2, 1, False, "deferred", False, 2, "balanced", "descending", 32, 1, True, True),
    (64, 128, 4, 1, False, "each", False, 1, "single", "longest_first", 32, 1, True, False),
    (128, 48, 2, 2, True, "each", False, 2, "balanced", "longest_first", 32, 1, True, True),
    (128, 32, 3, 1, False, "each", True, 2, "dynamic", "sectioned", 16, 1, True, False),
    (128, 32, 2, 1, True, "deferred", True, 2, "single", "ascending", 32, 1, True, True),
    (128, 112, 2, 2, True, "deferred", True, 1, "dynamic", "descending", 32, 1, False, False),
    (128, 80, 2, 2, True, "deferred", True, 1, "dynamic", "sectioned", 32, 1, False, True),
    (192, 96, 2, 1, True, "deferred", True, 1, "single", "descending", 32, 1, True, True),
    (192, 64, 3, 2, False, "deferred", False, 1, "balanced", "sectioned", 64, 1, False, False),
    (192, 80, 2, 2, False, "each", True, 1, "balanced", "ascending", 32, 1, False, False),
    (192, 128, 1, 1, False, "deferred", True, 1, "dynamic", "longest_first", 32, 1, True, True),
    (64, 96, 2, 1, True, "deferred", False, 1, "single", "ascending", 32, 2, False, True),
    (64, 64, 2, 2, False, "each", False, 1, "balanced", "sectioned", 32, 2, True, False),
    (128, 112, 2, 1, True, "each", True, 1, "single", "sectioned", 32, 2, False, False),
    (128, 80, 2, 2, False, "deferred", True, 1, "balanced", "ascending", 32, 2, False, True),
    (192, 64, 2, 2, True, "deferred", True, 1, "balanced", "ascending", 32, 2, True, False),
    (192, 80, 1, 1, False, "each", False, 1, "single", "sectioned", 16, 2, True, True),
    (64, 32, 1, 2, True, "deferred", False, 3, "dynamic", "ascending", 32, 1, True, False),
)


def config_90(**changes: Any) -> Config:
    return HOPPER.config({**BASE_90, **changes})


def _mixed_90() -> dict[str, Config]:
    configs = (config_90(**dict(zip(BASE_90, values, strict=True))) for values in _MIXED)
    pair = {1: "", 2: "_pair"}
    return {f"tma_{c.schedule}_{c.block_order}_{c.tile_m}x{c.blocks_per_sm}{pair[c.cluster]}": c for c in configs}


SCHEMES_90 = {
    "tma": config_90(),
    "tma_one_group": config_90(tile_m=64, tile_n=80, blocks_per_sm=2),
    "tma_three_groups": config_90(tile_m=192),
    "tma_one_stage": config_90(stages=1, tile_m=192, tile_n=32),
    "tma_three_stages": config_90(stages=3, tile_n=48),
    "tma_four_stages": config_90(stages=4, tile_n=32),
    "tma_serial": config_90(overlap=False, tile_n=128),
    "tma_rescale_each": config_90(rescale="each", tile_n=96),
    "tma_single": config_90(schedule="single"),
    "tma_dynamic": config_90(schedule="dynamic"),
    "tma_two_q": config_90(q_stages=2),
    "tma_turns": config_90(ping_pong=True),
    "tma_descending": config_90(block_order="descending"),
    "tma_longest_first": config_90(block_order="longest_first"),
    "tma_sectioned": config_90(block_order="sectioned"),
    "tma_pair": config_90(cluster=2),
    "tma_shared_weights": config_90(shared_weights=True, tile_m=192, tile_n=80),
    "tma_packed": config_90(pack_heads=True),
    "tma_split": config_90(splits="keys", schedule="single", tile_m=64, tile_n=32),
    "tma_split_packed": config_90(splits="keys", schedule="single", pack_heads=True, ping_pong=True),
    "tma_split_groups": config_90(splits="keys", schedule="single", tile_m=192, shared_weights=True, stages=1),
    **{f"tma_n{n}": config_90(tile_n=n) for n in (112, 144, 160, 176, 192, 208)},
    **_mixed_90(),
}

LARGE = sm90_forward_large.FAMILY
BASE_LARGE: dict[str, Any] = {
    "groups_share": "columns", "tile_n": 64, "chunk_d": 64, "stages": 4, "chunks_ahead": 2, "in_flight": 1,
    "output_splits": 1, "share_scores": False, "cluster": 1, "rescale": "deferred", "block_order": "ascending",
}  # fmt: skip


def config_large(**changes: Any) -> Config:
    return LARGE.config({**BASE_LARGE, **changes})


# Together they hold every value of every knob.
SCHEMES_LARGE = {
    "large": config_large(),
    "large_pair": config_large(cluster=2, tile_n=128, stages=6, in_flight=2),
    "large_four": config_large(
        cluster=4, chunk_d=128, chunks_ahead=1, stages=3, rescale="each", block_order="sectioned"
    ),
    "large_split": config_large(output_splits=2, cluster=2, chunks_ahead=4, stages=7, block_order="descending"),
    "large_serial": config_large(chunks_ahead=0, stages=2, tile_n=96),
    "large_192": config_large(tile_n=192, chunks_ahead=0, in_flight=2, stages=3, block_order="longest_first"),
    "large_rows": config_large(groups_share="rows", chunks_ahead=0, in_flight=3, stages=5),
    "large_rows_pair": config_large(
        groups_share="rows", chunks_ahead=1, cluster=2, stages=3, block_order="longest_first"
    ),
    "large_peers": config_large(groups_share="rows", tile_n=128, output_splits=2, share_scores=True),
    "large_peers_serial": config_large(
        groups_share="rows", tile_n=128, output_splits=2, share_scores=True, chunks_ahead=0, stages=2, rescale="each"
    ),
    **{f"large_stages{n}": config_large(stages=n) for n in (5, 8, 9, 10, 12, 16)},
}


@dataclass(frozen=True)
class Case:
    """One call: static problem, config, sizes and what else the call gives."""

    scheme: str
    mask: str = "causal"
    intervals: str = ""
    dtype: str = "bf16"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int = 0
    sizes: tuple[tuple[int, int], ...] = ((200, 200),)
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    aligned: bool = True
    magnitude: float = 1.0
    dropout: float = 0.0
    tf32: bool = False
    changes: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def problem(self) -> Problem:
        return Problem(
            dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v, mask=self.mask,
            intervals=self.intervals, softcap=bool(self.softcap), alibi=self.alibi, aligned=self.aligned,
            dropout=self.dropout > 0, tf32=self.tf32,
        )  # fmt: skip

    @property
    def config(self) -> Config:
        return (SCHEMES | SCHEMES_90 | SCHEMES_LARGE)[self.scheme].replace(**dict(self.changes))

    @property
    def family(self) -> Family:
        return HOPPER if self.scheme in SCHEMES_90 else LARGE if self.scheme in SCHEMES_LARGE else FAMILY

    @property
    def band(self) -> tuple[int, int]:
        return (-1, 0) if self.mask == "causal" else self.window

    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: str = "bshd",
        *,
        intervals: torch.Tensor | None = None,
        alibi: torch.Tensor | None = None,
    ) -> AttentionCall:
        """Of this case's mask and scores; the kind of intervals may be one that no caller can ask for with its band."""
        return AttentionCall(
            q, k, v, layout, self.band, intervals, self.intervals, softcap=self.softcap, alibi_slopes=alibi,
            dropout=self.dropout, rng=rng_of(q.device) if self.dropout else None,
            tf32=self.tf32,
        )  # fmt: skip

    def __str__(self) -> str:
        d = f"d{self.head_dim}" + (f"-{self.head_dim_v}" if self.head_dim_v else "")
        changes = (f"{k}={v}" for k, v in self.changes)
        dropout = f"dropout{self.dropout}" if self.dropout else ""
        tf32 = "tf32" if self.tf32 else ""
        extra = [self.intervals, self.dtype, d, f"h{self.heads}-{self.kv_heads}", dropout, tf32, *changes]
        return "-".join(filter(None, [self.scheme, self.mask, *extra]))


def rng_of(device: Any, seed: int = 0) -> torch.Tensor:
    """Seed and offset of a dropout, all of their bits in use."""
    drawn = torch.randint(0, 2**63 - 1, (2,), generator=torch.Generator().manual_seed(seed))
    return drawn.to(device)


def present() -> target.Target:
    found = target.gpu()
    assert found is not None
    return found


def kernel_of(case: Case) -> Kernel:
    case.family.require(case.problem, present(), case.config)
    return kernel.get(KernelSpec(case.family, case.problem, present(), case.config))


def build_all(cases: list[Case]) -> None:
    """Compile on all cores; a failure shows in the test that needs the kernel."""
    build_specs(KernelSpec(case.family, case.problem, present(), case.config) for case in cases)


def build_specs(specs: Iterable[KernelSpec]) -> None:
    distinct = {(spec.family.name, spec.problem.static_key, spec.config): spec for spec in specs}

    def one(spec: KernelSpec) -> None:
        try:
            kernel.get(spec)
        except Exception:  # noqa: BLE001 - told again, in full, by the test itself
            return

    ordered, workers = list(distinct.values()), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    # of several workers each begins elsewhere: who comes second finds a kernel, or waits for it
    begin = len(ordered) * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) // workers
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // workers)) as pool:
        list(pool.map(one, ordered[begin:] + ordered[:begin]))


def random_intervals(
    kind: str, batch: int, heads: int, rows: int, keys: int, generator: torch.Generator
) -> torch.Tensor:
    """Any vectors are legal; these are constant in runs of 90 keys, so that some tiles are empty and some are full."""
    count = {"lower1": 1, "lower2": 2, "both2": 2, "both4": 4}[kind]
    device = generator.device
    bounds = torch.randint(0, rows + 1, (batch, heads, keys, count), device=device, generator=generator)
    bounds = bounds.sort(-1).values
    if kind == "both2":
        bounds = bounds.flip(-1)  # the lower interval begins where the upper one has ended
    if kind == "both4":
        bounds = bounds[..., [2, 3, 0, 1]]
    return bounds[:, :, torch.arange(keys, device=device) // 90 * 90].to(torch.int32).contiguous()


def run(
    case: Case,
    rows: int,
    keys: int,
    *,
    seed: int = 0,
    batch: int = 2,
    layout: str = "bshd",
    intervals: torch.Tensor | None = None,
    device: str = "cuda",
    launch: Callable[..., Any] | None = None,
) -> reference.Verdict:
    """Launch on fresh random inputs (and intervals, if none are given) and poisoned outputs, and ask the oracle."""
    g = torch.Generator(device).manual_seed(seed)
    dtype, d, dv = DTYPES[case.dtype], case.head_dim, case.head_dim_v or case.head_dim
    pad = 0 if case.aligned else 1

    def tensor(length: int, heads: int, size: int) -> torch.Tensor:
        shape = (batch, length, heads, size + pad) if layout == "bshd" else (batch, heads, length, size + pad)
        values = torch.randn(shape, device=device, generator=g) * case.magnitude
        return values.to(dtype)[..., :size]

    q, k, v = tensor(rows, case.heads, d), tensor(keys, case.kv_heads, d), tensor(keys, case.kv_heads, dv)
    out = torch.full_like(tensor(rows, case.heads, dv), torch.nan)
    lse = torch.full((batch, case.heads, rows), torch.nan, device=device)
    if case.intervals and intervals is None:
        intervals = random_intervals(case.intervals, batch, case.kv_heads, rows, keys, g)
    alibi = torch.rand(case.heads, device=device, generator=g) if case.alibi else None
    call, outputs = case.call(q, k, v, layout, intervals=intervals, alibi=alibi), {"out": out, "lse": lse}
    (launch or kernel_of(case).launch)(call, outputs)
    return reference.check(call, outputs)
