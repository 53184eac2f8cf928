"""Continuous batching: requests share a paged cache, join when there is room and leave when they are done.

Each step is one call of `fagen.flash_attn_with_kvcache` a layer: chunks of new prompts among single tokens of running
requests, packed one behind the other, new keys appended to pages. The model is a toy with random weights; its tokens
must be those of a plain loop that computes each request alone and keeps nothing.

    python examples/serve.py                 20 requests
    python examples/serve.py --requests 100
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field

import torch
from torch.nn import functional

import fagen

VOCABULARY, DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 96, 64, 2, 4, 2, 16
PAGE, PAGES = 16, 24  # rows of a page; pages of the cache, too few for all requests at once
CHUNK = 24  # rows of a prompt that join a step
LONGEST = 128  # positions


class Model:
    """Attention is an argument, so that both ways of serving have the same weights."""

    def __init__(self, device: str) -> None:
        random_numbers = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=random_numbers) / rows**0.5).to(device)

        self.embedding = weight(VOCABULARY, DIM) * VOCABULARY**0.5
        columns = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.layers = [
            (weight(DIM, columns), weight(HEADS * HEAD_DIM, DIM), weight(DIM, 4 * DIM), weight(4 * DIM, DIM))
            for _ in range(LAYERS)
        ]
        angle = torch.arange(LONGEST)[:, None] / 10000 ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)

    def logits(self, tokens: torch.Tensor, attend) -> torch.Tensor:
        """`tokens` are rows one behind the other; attend(layer, q, k, v) is what a row makes of what it sees."""
        x = self.embedding[tokens]
        for number, (qkv, out, up, down) in enumerate(self.layers):
            heads = (functional.layer_norm(x, (DIM,)) @ qkv).unflatten(-1, (-1, HEAD_DIM))
            q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=-2)
            x = x + attend(number, q, k, v).flatten(-2) @ out
            x = x + functional.gelu(functional.layer_norm(x, (DIM,)) @ up) @ down
        return functional.layer_norm(x, (DIM,)) @ self.embedding.T


@dataclass
class Request:
    prompt: list[int]
    count: int  # tokens that it wants
    made: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # rows in the cache

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.made

    @property
    def needs(self) -> int:
        """Pages, of the prompt and all that is to come."""
        return -(-(len(self.prompt) + self.count) // PAGE)


class Server:
    def __init__(self, model: Model, device: str) -> None:
        self.model, self.device = model, device
        shape = PAGES, PAGE, KV_HEADS, HEAD_DIM
        self.cache = [(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for _ in range(LAYERS)]
        self.free = list(range(PAGES))
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def step(self) -> None:
        """Admit what fits, then one row of each running request, or a chunk of its prompt."""
        while self.waiting and self.waiting[0].needs <= len(self.free):
            request = self.waiting.pop(0)
            request.pages = [self.free.pop() for _ in range(request.needs)]
            self.running.append(request)
        rows = [request.tokens[request.cached :][:CHUNK] for request in self.running]
        starts = [sum(len(r) for r in rows[:i]) for i in range(len(rows) + 1)]
        logits = self.model.logits(
            self._integers([t for some in rows for t in some], torch.int64), self._attend(starts)
        )
        for request, new, last in zip(self.running, rows, starts[1:], strict=True):
            request.cached += len(new)
            if request.cached == len(request.tokens):  # else more of its prompt is to come
                request.made.append(int(logits[last - 1].argmax()))
        for request in [r for r in self.running if len(r.made) == r.count]:
            self.running.remove(request)
            self.free += request.pages

    def _attend(self, starts: list[int]):
        width = max(len(request.pages) for request in self.running)
        table = self._integers([(r.pages + [0] * width)[:width] for r in self.running])
        lengths, first = self._integers([r.cached for r in self.running]), self._integers(starts)
        most = max(b - a for a, b in zip(starts, starts[1:], strict=False))

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return fagen.flash_attn_with_kvcache(
                q, *self.cache[layer], k, v, rotary_cos=self.model.cos, rotary_sin=self.model.sin,
                rotary_interleaved=False, cache_seqlens=lengths, page_table=table, cu_seqlens_q=first,
                cu_seqlens_k_new=first, max_seqlen_q=most, causal=True,
            )  # fmt: skip

        return attend

    def _integers(self, values: list, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def alone(model: Model, request: Request, device: str) -> list[int]:
    """The same tokens by a plain loop: all rows again each time, PyTorch's attention, no cache."""
    tokens = list(request.prompt)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = model.cos[: len(x), None], model.sin[: len(x), None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (turned(q), turned(k), v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    for _ in range(request.count):
        logits = model.logits(torch.tensor(tokens, device=device), attend)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(request.prompt) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--device", default="cpu", help="where to compute; in float32, for which fagen has CPU kernels")
    args = parser.parse_args()
    chance, model = random.Random(0), Model(args.device)
    requests = [
        Request([chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 70))], chance.randint(1, 30))
        for _ in range(args.requests)
    ]
    server, coming, steps, together = Server(model, args.device), list(requests), 0, 0
    while coming or server.waiting or server.running:
        while coming and chance.random() < 0.5:  # requests come at any time
            server.waiting.append(coming.pop(0))
        if server.waiting or server.running:
            server.step()
            steps, together = steps + 1, max(together, len(server.running))
    made = sum(len(request.made) for request in requests)
    print(f"{len(requests)} requests, {made} tokens in {steps} steps, up to {together} requests together")
    wrong = [i for i, request in enumerate(requests) if request.made != alone(model, request, args.device)]
    assert not wrong, f"requests {wrong} got other tokens than alone"
    assert sorted(server.free) == list(range(PAGES)), "a page was lost"
    print("all tokens are those of a plain loop")


if __name__ == "__main__":
    with torch.no_grad():
        main()
