"""Backward kernels in the tests: their params, inputs with guards around the gradients, and the oracle.

The oracle is autograd through `reference.attend` in float64. A gradient is right when in every head its largest error is
at most three times that of autograd in the same dtype, plus one rounding at the head's largest magnitude.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fagen.families import Config, sm80_backward
from fagen.ops.attention import reference
from fagen.ops.attention.backward import BackwardProblem
from fagen.ops.attention.call import AttentionCall
from tests.support.cases import DTYPES, random_intervals

FAMILY = sm80_backward.FAMILY
GRADIENTS = ("dq", "dk", "dv")
_SENTINEL = 77.0  # stands where nothing may be written

BASE: dict[str, Any] = {
    "tile_m": 32, "tile_n": 64, "warps": 4, "weights_source": "shared", "row_warps": 2, "key_warps": 2,
    "dq_route": "atomics", "dq_row_warps": 2, "dq_tile_m": 32, "dq_tile_n": 16, "q_stages": 2, "dout_stages": 2,
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
    "one_dout_stage": config(dout_stages=1, blocks_per_sm=3),
    "held_one_stage": config(**_HELD, q_stages=1, dout_stages=1, smem_layout="padded"),
    "held_own_dq_one_stage": config(**_HELD, **{**_OWN, "dq_tile_n": 16}, q_stages=1, dout_stages=1),
    "v_held": config(v_source="registers", smem_layout="padded"),
    "all_held": config(**_HELD, v_source="registers"),
    "gqa_sums": config(gqa="atomics"),
    "held_gqa_sums": config(**_HELD, gqa="atomics", dout_stages=1, block_order="longest_first"),
    "longest_first": config(block_order="longest_first"),
    "own_dq_longest_first": config(**{**_OWN, "dq_tile_n": 64}, block_order="longest_first", smem_layout="padded"),
    "two_warps": config(warps=2, tile_n=32, row_warps=1, key_warps=1, dq_row_warps=1),
    "narrow": config(warps=2, tile_m=16, tile_n=32, row_warps=1, key_warps=2, dq_row_warps=1),
    "sixteen_keys": config(warps=2, tile_m=32, tile_n=16, row_warps=2, key_warps=1, dq_row_warps=2),
    "rows_split": config(tile_m=64, row_warps=4, key_warps=4, dq_row_warps=4),
    "ninety_six": config(tile_n=96, key_warps=2, smem_layout="padded"),
    "tall": config(tile_m=128, tile_n=64, row_warps=4, dq_row_warps=4),
    "eight": config(**_EIGHT),
    "eight_rows": config(**{**_EIGHT, "tile_m": 128, "key_warps": 8}, row_warps=8, dq_row_warps=8),
    "eight_held": config(**{**_EIGHT, **_HELD, "key_warps": 8, "tile_m": 32}),
    "eight_own_dq": config(**_EIGHT, **{**_OWN, "dq_tile_m": 128}),
    "eight_own_dq_tall": config(**{**_EIGHT, **_HELD, "key_warps": 8}, **{**_OWN, "dq_tile_m": 256}),
    "two_warps_own_dq": config(
        **{**_OWN, "dq_tile_m": 32}, warps=2, tile_n=32, row_warps=1, key_warps=1, smem_layout="padded"
    ),
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
    changes: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def problem(self) -> BackwardProblem:
        return BackwardProblem(
            dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v, mask=self.mask,
            intervals=self.intervals, softcap=bool(self.softcap), alibi=self.alibi, aligned=self.aligned,
            deterministic=self.deterministic,
        )  # fmt: skip

    @property
    def config(self) -> Config:
        return SCHEMES[self.scheme].replace(**dict(self.changes))

    @property
    def band(self) -> tuple[int, int]:
        return (-1, 0) if self.mask == "causal" else self.window

    def __str__(self) -> str:
        d = f"d{self.head_dim}" + (f"-{self.head_dim_v}" if self.head_dim_v else "")
        flags = [name for name in ("softcap", "alibi", "dlse", "deterministic") if getattr(self, name)]
        flags += [] if self.aligned else ["unaligned"]
        changes = (f"{k}={v}" for k, v in self.changes)
        window = f"w{self.window[0]},{self.window[1]}" if self.window != (-1, -1) else ""
        extra = [self.intervals, window, self.dtype, d, f"h{self.heads}-{self.kv_heads}", *flags, *changes]
        return "-".join(filter(None, [self.scheme, self.mask, *extra]))


# ---- the struct of a launch ------------------------------------------------------------------------------------------


class Tensor(ctypes.Structure):
    """`fagen_tensor`."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3)]


class Params(ctypes.Structure):
    """`fagen_backward_params` of `fagen/abi/backward.h`."""

    _fields_ = [
        *((name, Tensor) for name in "q k v o dout dq dk dv intervals alibi_slopes".split()),
        *((name, ctypes.c_void_p) for name in ("lse", "dlse", "workspace")),
        *(
            (name, ctypes.c_int32)
            for name in "batch heads kv_heads mask_heads seqlen_q seqlen_k head_dim head_dim_v "
            "window_left window_right".split()
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


@dataclass
class Inputs:
    """A call, what forward made of it, the gradients of that, and poisoned memory for its own."""

    call: AttentionCall
    out: torch.Tensor
    lse: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor | None
    gradients: dict[str, torch.Tensor]  # views into the next
    memory: dict[str, torch.Tensor]

    def params(self) -> Params:
        call = self.call
        tensors = {"q": call.q, "k": call.k, "v": call.v, "o": self.out, "dout": self.dout, **self.gradients}
        axes = (0, call.row_axis, call.head_axis)
        params = Params(lse=self.lse.data_ptr(), dlse=None if self.dlse is None else self.dlse.data_ptr())
        for name, t in tensors.items():
            setattr(params, name, Tensor(t.data_ptr(), (ctypes.c_int64 * 3)(*(t.stride(i) for i in axes))))
        if call.intervals is not None:
            t, params.mask_heads = call.intervals, call.intervals.shape[1]
            strides = (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1), t.stride(2))
            params.intervals = Tensor(t.data_ptr(), (ctypes.c_int64 * 3)(*strides))
        if call.alibi_slopes is not None:
            params.alibi_slopes = Tensor(call.alibi_slopes.data_ptr(), (ctypes.c_int64 * 3)(0, 0, 0))
        params.batch, params.heads, params.kv_heads = call.batch, call.heads, call.kv_heads
        params.seqlen_q, params.seqlen_k = call.seqlen_q, call.seqlen_k
        params.head_dim, params.head_dim_v = call.q.shape[3], call.v.shape[3]
        left, right = call.window
        params.window_left, params.window_right = min(left, call.seqlen_k), min(right, call.seqlen_q)
        params.scale = 1.0 / math.sqrt(call.q.shape[3]) if call.scale is None else call.scale
        params.softcap = call.softcap
        return params


class Library:
    """A backward kernel, however it was compiled."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fagen_workspace_bytes.restype = ctypes.c_uint64
        self.library.fagen_error.restype = ctypes.c_char_p
        self.library.fagen_params_size.restype = ctypes.c_uint32
        assert self.library.fagen_params_size() == ctypes.sizeof(Params)

    def launch(self, inputs: Inputs, stream: int | None = None) -> None:
        params, device = inputs.params(), inputs.call.q.device
        need = self.library.fagen_workspace_bytes(ctypes.byref(params))
        memory = torch.full((need + 512,), 0xA5, dtype=torch.uint8, device=device)  # guards at both ends
        params.workspace = -(-(memory.data_ptr() + 1) // 256) * 256
        begin = params.workspace - memory.data_ptr()
        status = self.library.fagen_launch(ctypes.byref(params), ctypes.c_void_p(stream))
        assert status == 0, self.library.fagen_error(status).decode()
        assert (memory[:begin] == 0xA5).all() and (memory[begin + need :] == 0xA5).all(), "workspace overrun"


# ---- inputs and the oracle -------------------------------------------------------------------------------------------


def make_inputs(
    case: Case, rows: int, keys: int, *, seed: int = 0, batch: int = 1, layout: str = "bshd", device: str = "cpu",
    intervals: torch.Tensor | None = None,
) -> Inputs:  # fmt: skip
    """Random; what forward made comes from PyTorch."""
    g = torch.Generator(device).manual_seed(seed)
    dtype, d, dv = DTYPES[case.dtype], case.head_dim, case.head_dim_v or case.head_dim
    pad = 8 if case.aligned else 3

    def memory(length: int, heads: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Guards stand behind the last row and behind every row."""
        shape = (batch, length + 1, heads, size + pad) if layout == "bshd" else (batch, heads, length + 1, size + pad)
        all_of_it = torch.full(shape, _SENTINEL, dtype=dtype, device=device)
        part = all_of_it[:, :length] if layout == "bshd" else all_of_it[:, :, :length]
        return all_of_it, part[..., :size]

    def tensor(length: int, heads: int, size: int) -> torch.Tensor:
        part = memory(length, heads, size)[1]
        return part.copy_(torch.randn(part.shape, device=device, generator=g) * case.magnitude)

    q, k, v = tensor(rows, case.heads, d), tensor(keys, case.kv_heads, d), tensor(keys, case.kv_heads, dv)
    if case.intervals and intervals is None:
        intervals = random_intervals(case.intervals, batch, case.kv_heads, rows, keys, g)
    alibi = torch.rand(case.heads, device=device, generator=g) if case.alibi else None
    call = AttentionCall(
        q, k, v, layout, case.band, intervals, case.intervals, softcap=case.softcap, alibi_slopes=alibi
    )
    exact = reference.cast(call.bhsd(), torch.float32)
    with torch.no_grad():
        made, lse = reference.attend(call, exact, reference.visible(call))
    out, dout = memory(rows, case.heads, dv)[1], tensor(rows, case.heads, dv)
    out.copy_(made.transpose(1, 2) if layout == "bshd" else made)
    dlse = torch.randn(lse.shape, device=device, generator=g) if case.dlse else None
    shapes = {"dq": (rows, case.heads, d), "dk": (keys, case.kv_heads, d), "dv": (keys, case.kv_heads, dv)}
    pairs = {name: memory(*shape) for name, shape in shapes.items()}
    for _, part in pairs.values():
        part.fill_(math.nan)
    return Inputs(
        call, out, lse.contiguous(), dout, dlse, {name: part for name, (_, part) in pairs.items()},
        {name: whole for name, (whole, _) in pairs.items()},
    )  # fmt: skip


def autograd(inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The gradients as autograd has them, in bhsd order."""
    call = inputs.call
    leaves = [t.detach().to(dtype).requires_grad_() for t in call.bhsd()]
    out, lse = reference.attend(call, (leaves[0], leaves[1], leaves[2]), reference.visible(call))
    dout = inputs.dout.transpose(1, 2) if call.layout == "bshd" else inputs.dout
    results, above = [out], [dout.to(out.dtype)]
    if inputs.dlse is not None:
        results.append(lse)
        above.append(inputs.dlse.to(lse.dtype))
    return dict(zip(GRADIENTS, torch.autograd.grad(results, leaves, above), strict=True))


def wrong(inputs: Inputs) -> str:
    """The first gradient that is not right, in words; empty if all are."""
    want = autograd(inputs, torch.float64)
    peer = autograd(inputs, inputs.call.q.dtype)
    for name in GRADIENTS:
        mine = inputs.gradients[name].transpose(1, 2) if inputs.call.layout == "bshd" else inputs.gradients[name]
        if not torch.isfinite(mine).all():
            return f"{name} is not finite at {[int(i) for i in (~torch.isfinite(mine)).nonzero()[0]]}"
        errors = [(t.double() - want[name]).abs().amax((-2, -1)) for t in (mine, peer[name])]
        largest = want[name].abs().amax((-2, -1))
        bound = 3 * errors[1] + torch.finfo(mine.dtype).eps / 2 * largest + 1e-6
        ratio = (errors[0] / bound).max()
        if not ratio <= 1:
            return f"{name}: error {float(errors[0].max()):.3g} is {float(ratio):.2f} of its bound"
        part = inputs.gradients[name]
        guards = inputs.memory[name].clone()
        (guards[:, : part.shape[1]] if inputs.call.layout == "bshd" else guards[:, :, : part.shape[2]])[
            ..., : part.shape[3]
        ].fill_(_SENTINEL)
        if not (guards == _SENTINEL).all():
            return f"{name}: something was written beside it"
    return ""


def run(case: Case, rows: int, keys: int, launch: Callable[[Inputs], None], **options: Any) -> str:
    """Launch on fresh random inputs; what is wrong with the gradients, in words."""
    inputs = make_inputs(case, rows, keys, **options)
    launch(inputs)
    return wrong(inputs)
