"""Train a tiny GPT twice from the same start, by fagen and by PyTorch's attention, and compare the losses.

The text is made here: sentences of an invented grammar, so that there is something to learn and nothing to download.

    python examples/train.py                  300 steps, on a GPU if there is one: in bfloat16 there
    python examples/train.py --packed         several documents a row, which do not see each other
    python examples/train.py --deterministic  fagen twice: the losses must agree in every bit
    python examples/train.py --dropout 0.1    both drop a tenth of the weights, each of its own choice
    python examples/train.py --device cpu     where to train
"""

from __future__ import annotations

import argparse
import os
import random

import torch
from torch import nn
from torch.nn import functional

import fagen

WORDS = {
    "who": "the cat|the dog|a bird|the old man|my friend|every child".split("|"),
    "does": "sees|follows|likes|never finds|waits for|runs from".split("|"),
    "where": "in the garden|by the river|behind the house|at night|".split("|"),
}
END = "."  # of a sentence, and of a document


def sentences(count: int, seed: int) -> list[str]:
    pick = random.Random(seed)

    def one() -> str:
        first, second = pick.choice(WORDS["who"]), pick.choice(WORDS["who"])
        words = [first, pick.choice(WORDS["does"]), second, pick.choice(WORDS["where"])]
        return " ".join(word for word in words if word) + END

    return [one() for _ in range(count)]


class Text:
    """Rows of characters as numbers, and for each the document that it belongs to."""

    def __init__(self, length: int, device: str) -> None:
        text = "".join(sentences(4000, seed=1))
        self.alphabet = sorted(set(text))
        self.length = length
        self.numbers = torch.tensor([self.alphabet.index(c) for c in text], device=device)
        ends = self.numbers == self.alphabet.index(END)
        self.documents = torch.cat([ends.new_zeros(1), ends[:-1]]).cumsum(0)

    def batch(self, size: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, what comes next, and documents."""
        pick = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.numbers) - self.length - 1, (size, 1), generator=pick)
        at = (starts + torch.arange(self.length)).to(self.numbers.device)
        return self.numbers[at], self.numbers[at + 1], self.documents[at]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attend: str, deterministic: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.attend, self.deterministic, self.dropout = heads, attend, deterministic, dropout
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(self.attention(q, k, v, documents).flatten(2))
        return x + self.mlp(self.behind(x))

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor:
        if self.attend == "fagen":
            intervals = None if documents is None else fagen.masks.from_documents(documents)
            return fagen.attention(
                q, k, v, causal=True, intervals=intervals, deterministic=self.deterministic, dropout_p=self.dropout
            )
        mask = None if documents is None else (documents[:, None, :, None] == documents[:, None, None, :]).tril()
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=documents is None, dropout_p=self.dropout
        )
        return out.transpose(1, 2)


class Gpt(nn.Module):
    def __init__(self, letters: int, length: int, attend: str, deterministic: bool, dropout: float) -> None:
        super().__init__()
        width, layers = 64, 2
        self.letter, self.place = nn.Embedding(letters, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4, attend, deterministic, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, letters: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        x = self.letter(letters) + self.place.weight
        for block in self.blocks:
            x = block(x, documents)
        return self.head(self.norm(x))


def train(
    attend: str, *, steps: int, packed: bool = False, deterministic: bool = False, dropout: float = 0.0,
    device: str = "cpu",
) -> list[float]:  # fmt: skip
    """The loss of each step."""
    text = Text(length=64, device=device)
    torch.manual_seed(0)
    model = Gpt(len(text.alphabet), text.length, attend, deterministic, dropout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        letters, following, documents = text.batch(4, step)
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            made = model(letters, documents if packed else None)
        loss = functional.cross_entropy(made.flatten(0, 1).float(), following.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="RATE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    how = {"steps": options.steps, "packed": options.packed, "dropout": options.dropout, "device": options.device}

    if options.deterministic:  # the rest of the model, too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    ours = train("fagen", deterministic=options.deterministic, **how)
    if options.deterministic:
        again = train("fagen", deterministic=True, **how)
        print("the losses of two runs agree in every bit:", ours == again)
        torch.use_deterministic_algorithms(False)
    theirs = train("sdpa", **how)
    print(f"{'step':>6} {'fagen':>8} {'sdpa':>8}")
    for step in sorted({*range(0, options.steps, 50), options.steps - 1}):
        print(f"{step:6} {ours[step]:8.4f} {theirs[step]:8.4f}")
    tail = min(50, options.steps)
    last = [sum(losses[-tail:]) / tail for losses in (ours, theirs)]
    print(f"mean of the last {tail}: fagen {last[0]:.4f}, sdpa {last[1]:.4f}, {last[0] / last[1] - 1:+.2%}")


if __name__ == "__main__":
    main()
