"""Random calls that append to a cache."""

from __future__ import annotations

import random

import torch

from fagen.ops.attention.cache_append import NewTokens
from fagen.ops.attention.decode_call import DecodeCall

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(seed: int) -> tuple[DecodeCall, NewTokens]:
    """Anything: dtypes, fp8, pages, packed rows, sequences in any order, rows that lie apart, angles of all kinds."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, fp8, page = draw.choice(DTYPES), draw.random() < 0.4, draw.choice([0, 1, 16])
    batch, group, kv_heads = draw.randint(1, 5), draw.choice([1, 3]), draw.choice([1, 2])
    dim = draw.choice([8, 15, 40])
    dim_v = draw.choice([dim, 24])
    packed, packed_q, room = draw.random() < 0.5, draw.random() < 0.5, 48
    counts = [draw.choice([0, 1, 2, 7]) if packed else 2 for _ in range(batch)]
    rows = [draw.choice([0, 1, 5]) if packed_q else 3 for _ in range(batch)]
    rows[0] = max(rows[0], 1)
    lengths = [draw.choice([0, 1, 15, 16, 30, room - n]) for n in counts]

    def held(*shape: int, extra: int = 3) -> torch.Tensor:
        """Rows of more than they show; some numbers large, some so small that fp8 has few bits for them."""
        made = torch.randn((*shape[:-1], shape[-1] + extra), generator=numbers)
        made *= torch.tensor([1.0, 300.0, 3e-3, 1e-5])[torch.randint(4, made.shape, generator=numbers)]
        return made.to(dtype)[..., : shape[-1]]

    def cache(width: int) -> torch.Tensor:
        size = (batch * -(-room // page) + 2, page) if page else (batch + 2, room)
        empty = torch.full((*size, kv_heads, width + 2), 7.0)
        return empty.to(FP8 if fp8 else dtype)[..., :width]

    def starts(values: list[int]) -> torch.Tensor:
        return integers([sum(values[:i]) for i in range(batch + 1)])

    def scale() -> torch.Tensor | None:
        return torch.rand((batch, kv_heads), generator=numbers) + 0.1 if fp8 and draw.random() < 0.7 else None

    order = draw.sample(
        range(batch * -(-room // page) + 2 if page else batch + 2), batch * (-(-room // page) if page else 1)
    )
    half, angle = draw.choice([0, dim // 4, dim // 2]), draw.choice(DTYPES)
    turns = torch.rand((120, half + 1), generator=numbers)[:, :half] * 6 if half else None
    lead_q = (sum(rows),) if packed_q else (batch, 3)
    lead = (sum(counts),) if packed else (batch, 2)
    call = DecodeCall(
        held(*lead_q, kv_heads * group, dim), cache(dim), cache(dim_v), integers(lengths),
        page_table=integers(order).view(batch, -1) if page else None,
        cu_seqlens_q=starts(rows) if packed_q else None, cache_batch_idx=None if page else integers(order),
        k_scale=scale(), v_scale=scale(), most_rows=5 if packed_q else 0,
        most_keys=draw.choice([0, room]),
    )  # fmt: skip
    new = NewTokens(
        held(*lead, kv_heads, dim), held(*lead, kv_heads, dim_v, extra=0), starts(counts) if packed else None,
        None if turns is None else turns.cos().to(angle), None if turns is None else turns.sin().to(angle),
        integers([draw.randint(0, 100) for _ in range(batch)]) if draw.random() < 0.5 else None,
        draw.random() < 0.5, draw.random() < 0.5,
    )  # fmt: skip
    return call, new


def integers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bits(t: torch.Tensor) -> torch.Tensor:
    """All of its memory, what it does not show as well."""
    return t.new_empty(0).set_(t.untyped_storage()).view(torch.uint8)


def clone_with_memory(t: torch.Tensor) -> torch.Tensor:
    whole = t.new_empty(0).set_(t.untyped_storage()).clone()
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())
