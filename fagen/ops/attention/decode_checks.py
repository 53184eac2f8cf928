"""The contents of a decode call's tensors of lengths and indices. To look at them waits for a GPU, so it is not done
there unless FAGEN_DEBUG asks for it; on the CPU it is cheap."""

from __future__ import annotations

import itertools

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention.decode_call import DecodeCall


def check_contents(call: DecodeCall) -> None:
    """Raise InvalidArgument for what would have a kernel read or write outside of the cache."""
    if not call.batch:
        return
    check_range("cache_seqlens", call.seqlens_k, 0, call.seqlen_k, "keys of a sequence, the new ones counted")
    if call.cache_batch_idx is not None:
        check_range("cache_batch_idx", call.cache_batch_idx, 0, call.k.shape[0] - 1, "sequences of the cache")
    if call.cu_seqlens_q is not None:
        check_starts("cu_seqlens_q", call.cu_seqlens_q, call.rows, call.seqlen_q)
    if call.page_table is not None:
        used = torch.arange(call.page_table.shape[1], device=call.q.device) * call.page < call.seqlens_k[:, None]
        found = call.page_table.masked_fill(~used, 0)
        check_range("page_table", found, 0, call.k.shape[0] - 1, "pages of the cache")


def check_range(name: str, t: torch.Tensor, least: int, most: int, what: str) -> None:
    if not t.numel():
        return
    low, high = (int(x) for x in t.aminmax())
    if low < least or high > most:
        wrong = low if low < least else high
        raise InvalidArgument(f"{name} holds {wrong}", f"{what}: {least} to {most}")


def check_starts(name: str, starts: torch.Tensor, rows: int, most: int) -> None:
    """That they begin at 0, do not decrease, end within the rows, and no sequence has more than `most` of them."""
    first, *_, last = values = starts.tolist()
    counts = [b - a for a, b in itertools.pairwise(values)]
    if first != 0 or last > rows or min(counts) < 0:
        raise InvalidArgument(f"{name} must rise from 0 to at most {rows} rows", f"it is {str(values)[:60]}")
    if max(counts) > most:
        raise InvalidArgument(f"a sequence of {name} has {max(counts)} rows", f"at most {most} are announced")
