"""The memory that a call takes at its peak, beside what was there before it."""

from __future__ import annotations

from fagen.bench.peers import Serve
from fagen.bench.rows import Inputs


def peak(serve: Serve, inputs: Inputs, device: str) -> int | None:
    """Bytes of one call, what it returns included; None on a CPU, whose memory PyTorch does not count."""
    if device != "cuda":
        return None
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    serve(inputs)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
