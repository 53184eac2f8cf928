"""Tune one shape from Python, and see that calls of that shape use the winner: on a GPU if there is one. There give it
minutes: budget="3m" in the place of trials."""

import os

import torch

import fagen


def main() -> None:
    device, dtype = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    problem = fagen.Problem(dtype=dtype, head_dim=64, mask="causal", heads=4, seqlen_q=256)
    report = fagen.tune(problem, trials=int(os.environ.get("TRIALS", "8")), quiet=True)
    for tuned in report.results:
        print(f"{tuned.key}: {tuned.gain} ({tuned.why})")
    print("written to", *report.written)

    # picked: exact. The record is in your own database, which every process of yours reads.
    shape = (1, 256, 4, 64)  # batch, length, heads, head dim
    of = {"device": device, "dtype": torch.bfloat16 if dtype == "bf16" else torch.float32}
    q, k, v = (torch.randn(shape, **of) for _ in range(3))
    print(fagen.explain(q, k, v, causal=True))
    print("out", tuple(fagen.attention(q, k, v, causal=True).shape))


if __name__ == "__main__":  # the tuner's workers are processes that import this file
    main()
