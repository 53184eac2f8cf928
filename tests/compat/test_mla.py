"""fagen.mla_decode: what it gives on a CPU, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fagen
from fagen.errors import InvalidArgument

DIM, LATENT, HEADS = 48, 32, 6


def _reference(
    q: torch.Tensor, rows: list[torch.Tensor], scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, sequence by sequence; `rows` are the keys of each."""
    outs, lses = [], []
    for mine, keys in zip(q.double(), rows, strict=True):
        scores = torch.einsum("thd,kd->htk", mine, keys.double()) * scale
        if causal:
            tokens, count = mine.shape[0], keys.shape[0]
            hidden = torch.arange(count) > torch.arange(tokens)[:, None] + count - tokens
            scores = scores.masked_fill(hidden, -math.inf)
        outs.append(torch.einsum("htk,kd->thd", scores.softmax(-1), keys.double()[:, :LATENT]))
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize(("scale", "head_dimension"), [(None, False), (0.2, True)])
def test_a_step_on_pages_and_without(scale: float | None, head_dimension: bool) -> None:
    tokens, causal = 3, True
    g = torch.Generator().manual_seed(0)
    lengths, page, width = [70, 16, 33], 16, 5
    table = torch.randperm(20, generator=g)[: 3 * width].view(3, width)
    cache = torch.randn(20, page, DIM, generator=g)
    q = torch.randn(3, tokens, HEADS, DIM, generator=g)
    flat = cache[table].flatten(1, 2)  # (batch, keys, d)
    want = _reference(q, [flat[b, :n] for b, n in enumerate(lengths)], scale or DIM**-0.5, causal)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    settings: dict[str, Any] = {"v_dim": LATENT, "scale": scale, "causal": causal, "return_lse": True}
    if head_dimension:
        cache, flat = cache.unsqueeze(2), flat.unsqueeze(2)
    for given, more in ((cache, {"page_table": table.int()}), (flat, {})):
        out, lse = fagen.mla_decode(q, given, seqlens, **more, **settings)
        assert torch.allclose(out.double(), want[0], atol=1e-5) and torch.allclose(lse.double(), want[1], atol=1e-5)
        alone = fagen.mla_decode(q, given, seqlens, **more, **{**settings, "return_lse": False})
        assert isinstance(alone, torch.Tensor) and torch.equal(alone, out)


def test_packed_rows_and_one_length() -> None:
    g = torch.Generator().manual_seed(1)
    cache, q = torch.randn(2, 40, DIM, generator=g), torch.randn(4, HEADS, DIM, generator=g)
    starts = torch.tensor([0, 3, 4], dtype=torch.int32)
    found = fagen.mla_decode(q, cache, 40, v_dim=LATENT, causal=True, cu_seqlens_q=starts, max_seqlen_q=3)
    first, _ = _reference(q[None, :3], [cache[0]], DIM**-0.5, causal=True)
    last, _ = _reference(q[None, 3:], [cache[1]], DIM**-0.5, causal=True)
    assert isinstance(found, torch.Tensor)
    assert torch.allclose(found.double(), torch.cat([first[0], last[0]]), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_cache": torch.zeros(2, 40)}, "kv_cache must be"), ({"kv_cache": [1]}, "kv_cache must be"),
        ({"kv_cache": torch.zeros(2, 40, 2, DIM)}, "2 heads"), ({"v_dim": DIM + 1}, "48 columns"),
        ({"v_dim": 0}, "v_dim=0"), ({"v_dim": 1.5}, "v_dim"),
        ({"q": torch.zeros(2, 1, HEADS, DIM + 8)}, "head_dim of q"),
    ],
)  # fmt: skip
def test_what_it_refuses(changes: dict[str, Any], says: str) -> None:
    given = {"q": torch.zeros(2, 1, HEADS, DIM), "kv_cache": torch.zeros(2, 40, DIM), "v_dim": LATENT, **changes}
    with pytest.raises(InvalidArgument, match=says):
        fagen.mla_decode(given.pop("q"), given.pop("kv_cache"), 40, **given)
