"""Backward kernels in the tests: what they run, their inputs, and guards around their gradients and workspace."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fagen.families import Config, sm80_backward
from fagen.ops.attention import gradients, reference
from fagen.ops.attention.backward import BackwardProblem
from fagen.ops.attention.backward_call import GRADIENTS, BackwardCall
from fagen.ops.attention.call import AttentionCall
from fagen.ops.attention.params import make_backward_params
from fagen.ops.oracle import Verdict
from fagen.runtime.kernel import Library
from tests.support.cases import DTYPES, random_intervals, rng_of

FAMILY = sm80_backward.FAMILY
_SENTINEL = 77.0  # stands where nothing may be written

BASE: dict[str, Any] = {
    "tile_m": 32, "tile_n": 64, "warps": 4, "weights_source": "shared", "row_warps": 2, "key_warps": 2,
    "dq_route": "atomics", "dq_row_warps": 2, "dq_tile_m": 64, "dq_tile_n": 16, "q_stages": 2, "dout_stages": 2,
    "v_source": "shared", "smem_layout": "swizzled", "gqa": "in_block", "block_order": "ascending", "blocks_per_sm": 1,
}  # fmt: skip
_HELD: dict[str, Any] = {"weights_source": "registers", "row_warps": 1, "key_warps": 4}
_OWN: dict[str, Any] = {"dq_route": "own_kernel", "dq_row_warps": 1, "dq_tile_m": 64, "dq_tile_n": 32}
_EIGHT: dict[str, Any] = {"warps": 8, "tile_m": 64, "tile_n": 128, "key_warps": 4}


def config(**changes: Any) -> Config:
    return FAMILY.config({**BASE, **changes})


# One config a line differs from BASE in what its name says; together they hold every value of every knob.
SCHEMES = {
    "base": config(),
    "held": config(**_HELD),
    "own_dq": config(**_OWN),
    "held_own_dq": config(**_HELD, **_OWN, blocks_per_sm=2),
    "one_stage": config(q_stages=1, dout_stages=1),
    "one_q_stage": config(q_stages=1, smem_layout="padded"),
    "one_dout_stage": config(dout_stages=1, blocks_per_sm=2),
    "held_one_stage": config(**_HELD, q_stages=1, dout_stages=1, smem_layout="padded"),
    "held_own_dq_one_stage": config(**_HELD, **{**_OWN, "dq_tile_n": 16}, q_stages=1, dout_stages=1),
    "v_held": config(v_source="registers", smem_layout="padded"),
    "all_held": config(**_HELD, v_source="registers"),
    "gqa_sums": config(gqa="atomics"),
    "held_gqa_sums": config(**_HELD, gqa="atomics", dout_stages=1, block_order="longest_first"),
    "longest_first": config(block_order="longest_first"),
    "own_dq_longest_first": config(**{**_OWN, "dq_tile_n": 64}, block_order="longest_first", smem_layout="padded"),
    "one_row_warp": config(row_warps=1, key_warps=1, dq_row_warps=1, tile_n=64),
    "small": config(tile_n=32),
    "rows_split": config(tile_m=64, row_warps=4, key_warps=4, dq_row_warps=4),
    "ninety_six": config(tile_n=96, key_warps=2, smem_layout="padded"),
    "tall": config(tile_m=128, tile_n=64, row_warps=4, dq_row_warps=4),
    "eight": config(**_EIGHT),
    "eight_rows": config(**{**_EIGHT, "tile_m": 128, "key_warps": 8}, row_warps=4, dq_row_warps=4),
    "eight_held": config(**{**_EIGHT, **_HELD, "key_warps": 8, "tile_m": 32}),
    "eight_own_dq": config(**_EIGHT, **{**_OWN, "dq_tile_m": 128}),
    "eight_held_own_dq": config(**{**_EIGHT, **_HELD, "key_warps": 8}, **{**_OWN, "dq_tile_m": 128}),
}


@dataclass(frozen=True)
class Case:
    """One call: static problem, config, sizes and what else the call gives."""

    scheme: str
    mask: str = "causal"
    intervals: str = ""
    dtype: str = "bf16"
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    head_dim_v: int = 0
    sizes: tuple[tuple[int, int], ...] = ((100, 100),)
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    aligned: bool = True
    deterministic: bool = False
    dlse: bool = False
    magnitude: float = 1.0
    dropout: float = 0.0
    changes: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def problem(self) -> BackwardProblem:
        return BackwardProblem(
            dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v, mask=self.mask,
            intervals=self.intervals, softcap=bool(self.softcap), alibi=self.alibi, aligned=self.aligned,
            deterministic=self.deterministic, dropout=self.dropout > 0,
        )  # fmt: skip

    @property
    def config(self) -> Config:
        return SCHEMES[self.scheme].replace(**dict(self.changes))

    @property
    def band(self) -> tuple[int, int]:
        return (-1, 0) if self.mask == "causal" else self.window

    def __str__(self) -> str:
        d = f"d{self.head_dim}" + (f"-{self.head_dim_v}" if self.head_dim_v else "")
        flags = [name for name in ("softcap", "alibi", "dlse", "deterministic", "dropout") if getattr(self, name)]
        flags += [] if self.aligned else ["unaligned"]
        changes = (f"{k}={v}" for k, v in self.changes)
        window = f"w{self.window[0]},{self.window[1]}" if self.window != (-1, -1) else ""
        extra = [self.intervals, window, self.dtype, d, f"h{self.heads}-{self.kv_heads}", *flags, *changes]
        return "-".join(filter(None, [self.scheme, self.mask, *extra]))


_OF_INTERVALS = ("lower1", "lower2", "both2", "both4")
_BANDS = {"window": (40, 20)}


def in_turns(case: Callable[..., Case], schemes: Iterable[str], head_dims: Mapping[str, int]) -> list[Any]:
    """A case for each scheme: masks, alignment and the gradient of the LSE turn from one to the next."""
    made = []
    for number, scheme in enumerate(schemes):
        mask = ("none", "causal", "window", "intervals")[number % 4]
        kind = _OF_INTERVALS[number // 4 % 4] if mask == "intervals" else ""
        made.append(
            case(
                scheme, mask=mask, intervals=kind, window=_BANDS.get(mask, (-1, -1)),
                head_dim=head_dims.get(scheme, 64), aligned=number % 3 > 0, dlse=number % 2 > 0,
                sizes=((70, 150), (150, 70)),
            )
        )  # fmt: skip
    return made


# ---- inputs, a launch between guards, the oracle ---------------------------------------------------------------------


def make_call(
    case: Case, rows: int, keys: int, *, seed: int = 0, batch: int = 1, layout: str = "bshd", device: str = "cpu",
    intervals: torch.Tensor | None = None,
) -> BackwardCall:  # fmt: skip
    """Random tensors; what forward made of them comes from PyTorch."""
    g = torch.Generator(device).manual_seed(seed)
    d, dv = case.head_dim, case.head_dim_v or case.head_dim

    def tensor(length: int, heads: int, size: int) -> torch.Tensor:
        part = _memory(case, layout, (batch, length, heads, size), device)[1]
        return part.copy_(torch.randn(part.shape, device=device, generator=g) * case.magnitude)

    q, k, v = tensor(rows, case.heads, d), tensor(keys, case.kv_heads, d), tensor(keys, case.kv_heads, dv)
    if case.intervals and intervals is None:
        intervals = random_intervals(case.intervals, batch, case.kv_heads, rows, keys, g)
    alibi = torch.rand(case.heads, device=device, generator=g) if case.alibi else None
    call = AttentionCall(
        q, k, v, layout, case.band, intervals, case.intervals, softcap=case.softcap, alibi_slopes=alibi,
        deterministic=case.deterministic, dropout=case.dropout, rng=rng_of(device) if case.dropout else None,
    )  # fmt: skip
    made = torch.zeros(batch, case.heads, rows, dv, device=device)
    lse = torch.full((batch, case.heads, rows), -math.inf, device=device)
    if rows and keys:
        with torch.no_grad():
            made, lse = reference.attend(call, reference.cast(call.bhsd(), torch.float32), reference.visible(call))
    out = _memory(case, layout, (batch, rows, case.heads, dv), device)[1]
    out.copy_(made.transpose(1, 2) if layout == "bshd" else made)
    dlse = torch.randn(lse.shape, device=device, generator=g) if case.dlse else None
    dout = tensor(rows, case.heads, dv)
    return BackwardCall.after(call, out, lse.contiguous(), dout, dlse)


def _memory(case: Case, layout: str, shape: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (batch, rows, heads, head_dim) tensor in the layout's order, behind the guards around it."""
    batch, length, heads, size = shape
    pad = 8 if case.aligned else 3
    whole = (batch, length + 1, heads, size + pad) if layout == "bshd" else (batch, heads, length + 1, size + pad)
    memory = torch.full(whole, _SENTINEL, dtype=DTYPES[case.dtype], device=device)
    part = memory[:, :length] if layout == "bshd" else memory[:, :, :length]
    return memory, part[..., :size]


def launch(case: Case, call: BackwardCall, library: Library, stream: int | None = None) -> dict[str, torch.Tensor]:
    """The gradients of a call, from poisoned memory. Nothing may be written beside them, nor beside the workspace."""
    lengths = {"dq": (call.seqlen_q, call.heads), "dk": (call.seqlen_k, call.kv_heads)}
    outputs, memory = {}, {}
    for name, like in GRADIENTS.items():
        shape = (call.batch, *lengths.get(name, lengths["dk"]), getattr(call, like).shape[3])
        memory[name], outputs[name] = _memory(case, call.layout, shape, str(call.q.device))
        outputs[name].fill_(math.nan)
    params = make_backward_params(call, outputs)
    need = library.workspace_bytes(ctypes.byref(params))
    workspace = torch.full((need + 512,), 0xA5, dtype=torch.uint8, device=call.q.device)
    params.workspace = -(-(workspace.data_ptr() + 1) // 256) * 256
    begin = params.workspace - workspace.data_ptr()
    status = library.launch(ctypes.byref(params), stream)
    assert status == 0, library.error(status).decode()
    assert (workspace[:begin] == 0xA5).all() and (workspace[begin + need :] == 0xA5).all(), "beside the workspace"
    for name, part in outputs.items():
        found = part.clone()
        part.fill_(_SENTINEL)
        assert (memory[name] == _SENTINEL).all(), f"something was written beside {name}"
        outputs[name] = part.copy_(found)
    return outputs


def run(case: Case, rows: int, keys: int, library: Library, stream: int | None = None, **options: Any) -> Verdict:
    """Launch on fresh random inputs, and ask the oracle."""
    call = make_call(case, rows, keys, **options)
    return gradients.check(call, launch(case, call, library, stream))
