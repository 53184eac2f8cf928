"""The inputs that are timed and verified: random tensors, packed documents, guards around the outputs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fagen.ops.attention import masks
from fagen.ops.attention.problem import INTERVAL_KINDS, TORCH_DTYPES, Problem
from fagen.target import Target

if TYPE_CHECKING:
    import torch

    from fagen.ops.attention.call import AttentionCall

SOFTCAP = 30.0
DOCUMENTS = 4  # a sequence, in the inputs of the intervals mask
_MOST_SETS = 32  # of inputs
_MOST_BYTES = 2 << 30  # of all input sets together
GUARD_BYTES = 4096  # before and behind each output
_SENTINEL = -1536.0  # what nobody may overwrite; exact in every dtype


@dataclass(frozen=True)
class Inputs:
    """A call, and room for its outputs by name. Remembers what no kernel may change."""

    call: AttentionCall
    outputs: dict[str, torch.Tensor]
    _memory: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # of each output, guards and all
    _sums: dict[str, int] = field(default_factory=dict, repr=False)  # of q, k and v

    def change(self, **fields: Any) -> Inputs:
        """Other arguments of the call, with the same outputs."""
        return dataclasses.replace(self, call=dataclasses.replace(self.call, **fields))

    def damage(self) -> str:
        """What a kernel wrote where it must not: into q, k or v, or beside its outputs. Empty if it did not."""
        changed = [
            f"wrote into its input {n}" for n, bits in self._sums.items() if _bits(getattr(self.call, n)) != bits
        ]
        beside = [f"wrote outside of {n}" for n, memory in self._memory.items() if not _intact(self.outputs[n], memory)]
        return " and ".join(changed + beside)


def _guarded(
    shape: tuple[int, ...], shown: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """An output full of NaN, and its memory: sentinels before, behind, and between rows that show less than they hold.

    A tensor made in inference mode, or inside an op, does not know its base.
    """
    import torch

    guard = GUARD_BYTES // dtype.itemsize
    memory = torch.full((math.prod(shape) + 2 * guard,), _SENTINEL, dtype=dtype, device=device)
    return memory[guard:-guard].view(shape)[..., :shown].fill_(math.nan), memory


def _bits(t: torch.Tensor) -> int:
    """Of all bits of a tensor's memory, whatever they mean; sums of integers have no order."""
    import torch

    memory = t.new_empty(0).set_(t.untyped_storage()).view(torch.uint8)
    whole = memory.numel() // 8 * 8
    return int(memory[:whole].view(torch.int64).sum()) + int(memory[whole:].sum())


def _intact(t: torch.Tensor, memory: torch.Tensor) -> bool:
    guard = GUARD_BYTES // t.element_size()
    between = memory[guard:-guard].view(*t.shape[:-1], -1)[..., t.shape[-1] :]
    return all(bool((part == _SENTINEL).all()) for part in (memory[:guard], memory[-guard:], between))


def make_inputs(problem: Problem, where: Target | torch.device | str, seed: int = 0, *, varied: bool = False) -> Inputs:
    """Random normal q, k, v in bshd, `out` and `lse` full of NaN, and what the mask and features need.

    `varied` gives each kv head its own intervals, with holes where the kind can have them; for verification.
    """
    import torch

    from fagen.ops.attention.call import AttentionCall

    device = torch.device(("cuda" if where.is_gpu else "cpu") if isinstance(where, Target) else where)
    dtype = getattr(torch, TORCH_DTYPES[problem.dtype])
    random = torch.Generator(device).manual_seed(seed)
    p = problem

    def shape(length: int, heads: int, dim: int) -> tuple[int, ...]:
        # a row of one element more than it shows starts anywhere
        return p.batch, length, heads, dim if p.aligned else dim + 1

    def tensor(length: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(shape(length, heads, dim), generator=random, dtype=dtype, device=device)[..., :dim]

    q = tensor(p.seqlen_q, p.heads, p.head_dim)
    k, v = (tensor(p.seqlen_k, p.kv_heads, dim) for dim in (p.head_dim, p.head_dim_v))
    made = {
        "out": _guarded(shape(p.seqlen_q, p.heads, p.head_dim_v), p.head_dim_v, dtype, device),
        "lse": _guarded((p.batch, p.heads, p.seqlen_q), p.seqlen_q, torch.float32, device),
    }
    intervals = documents(p, seed, varied=varied).to(device) if p.intervals else None
    slopes = None
    if p.alibi:
        of_heads = [2.0 ** (-8.0 * (head + 1) / p.heads) for head in range(p.heads)]
        slopes = torch.tensor(of_heads, dtype=torch.float32, device=device).expand(p.batch, -1).contiguous()
    call = AttentionCall(
        q, k, v, window=(p.window_left, p.window_right), intervals=intervals, kind=p.intervals,
        softcap=SOFTCAP if p.softcap else 0.0, alibi_slopes=slopes, out=made["out"][0],
    )  # fmt: skip
    outputs, memory = ({name: pair[i] for name, pair in made.items()} for i in (0, 1))
    return Inputs(call, outputs, memory, {name: _bits(getattr(call, name)) for name in ("q", "k", "v")})


def documents(problem: Problem, seed: int, *, varied: bool) -> torch.Tensor:
    """Intervals of packed documents of random lengths, in the problem's kind: int32 (batch, 1 or kv_heads, Sk, n)."""
    import torch

    p, random = problem, torch.Generator().manual_seed(seed)
    planes = p.batch * (p.kv_heads if varied else 1)
    cuts = torch.randint(1, max(2, p.seqlen_k), (planes, min(DOCUMENTS, p.seqlen_k) - 1), generator=random)
    ids = (torch.arange(p.seqlen_k)[None, :, None] >= cuts[:, None, :]).sum(-1)
    bounds = masks.from_documents(ids, causal=False)[:, 0] - (p.seqlen_k - p.seqlen_q)
    end, start = bounds.clamp(0, p.seqlen_q).unbind(-1)
    bottom = torch.full_like(end, p.seqlen_q)
    columns = {"LTS": end, "LTE": (end + bottom + 1) // 2 if varied else bottom}
    columns |= {"UTS": start // 2 if varied else torch.zeros_like(start), "UTE": start}
    chosen = torch.stack([columns[name] for name in INTERVAL_KINDS[p.intervals]], dim=-1).to(torch.int32)
    return chosen.reshape(p.batch, -1, *chosen.shape[1:]).contiguous()


def input_bytes(problem: Problem) -> int:
    p = problem
    of_q = p.batch * p.heads * p.seqlen_q * (p.head_dim + p.head_dim_v)
    return p.itemsize * (of_q + p.batch * p.kv_heads * p.seqlen_k * (p.head_dim + p.head_dim_v))


def input_sets(problem: Problem, target: Target) -> int:
    """How many sets of inputs to take in turn, so that a GPU's L2 does not hold what the next call reads."""
    size = input_bytes(problem)
    if not target.is_gpu or size >= 3 * target.l2:
        return 1
    return max(1, min(-(-3 * target.l2 // size), _MOST_SETS, _MOST_BYTES // size))
