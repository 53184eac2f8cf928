"""The peers on a cache: PyTorch's SDPA, FlashAttention 3 and FlashInfer. Each takes q and the cache as ours does.

What a server would do once for all layers of a step (lengths on the host, plans, metadata) is done before the clock
runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fagen.bench.flash_arguments import fill, of_schema
from fagen.bench.peers import Cannot, Prepare, Serve
from fagen.bench.rows import Inputs, Row

if TYPE_CHECKING:
    import torch

    from fagen.ops.attention.decode_call import DecodeCall

    Run = Callable[[], torch.Tensor]

_WORKSPACE = 256 << 20  # bytes, FlashInfer's
_PAGE = 16  # rows of the pages that FlashInfer is told a contiguous cache has
_LARGE_GROUP = 4  # heads on a kv head, from which on FlashInfer's tensor core kernel is the faster one


def once(make: Callable[[DecodeCall], Run]) -> Serve:
    """A function of the inputs that prepares each set of them once."""
    made: dict[int, Run] = {}

    def serve(i: Inputs) -> torch.Tensor:
        if id(i) not in made:
            made[id(i)] = make(i.call)
        return made[id(i)]()

    return serve


def _require(call: DecodeCall) -> None:
    """What neither library has on a cache."""
    if call.k.dtype != call.q.dtype:
        raise Cannot("it takes no q of 16 bits on a cache in fp8 with a scale for each sequence and head")
    if call.sinks is not None:
        raise Cannot("it has no sinks")


# ---- SDPA -----------------------------------------------------------------------------------------------------------


def by_sdpa(backend: str) -> Prepare:
    """PyTorch's SDPA on the keys of a contiguous cache, by a backend, or by that of its choice.

    It is told how many keys there are when it is prepared.
    """

    def prepare(row: Row, inputs: Inputs) -> Serve:
        from fagen.ops.attention.decode_calls import torch_peer

        run, how = torch_peer(inputs.call)
        if run is None:
            raise Cannot(how)
        return once(lambda call: _held(torch_peer(call)[0], backend))

    return prepare


def _held(run: Any, backend: str) -> Run:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not backend:
        return lambda: run().transpose(1, 2)

    def held() -> torch.Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            made: torch.Tensor = run()
        return made.transpose(1, 2)

    return held


# ---- FlashAttention 3 -----------------------------------------------------------------------------------------------


def through_fa3(op: Any, plan: Any = None) -> Prepare:
    """Its op, by the argument names of its schema; `plan` is its op for the metadata of a batch of lengths."""

    def prepare(row: Row, inputs: Inputs) -> Serve:
        _require(inputs.call)

        def make(call: DecodeCall) -> Run:
            fixed = _fa3_arguments(op, plan, call)
            return lambda: op(q=call.q, k=call.k, v=call.v, **fixed)[0]

        return once(make)

    return prepare


def _fa3_arguments(op: Any, plan: Any, call: DecodeCall) -> dict[str, Any]:
    left, right = call.window
    causal = (left, right) == (-1, 0)
    shared = {
        "seqused_k": call.seqlens_k, "cu_seqlens_q": call.cu_seqlens_q, "causal": causal, "window_left": left,
        "window_right": -1 if causal else right, "num_splits": 0,
    }  # fmt: skip
    most_rows = {"max_seqlen_q": call.seqlen_q} if call.ragged else {}
    metadata = None if plan is None else _fa3_metadata(plan, call, shared)
    wanted = {
        **shared, **most_rows, "page_table": call.page_table, "kv_batch_idx": call.cache_batch_idx,
        "scale": scale_of(call), "softcap": call.softcap,
    }  # fmt: skip
    arguments = of_schema(op._schema)
    if metadata is not None and any(argument.name == "scheduler_metadata" for argument in arguments):
        wanted["scheduler_metadata"] = metadata
    return fill(arguments, wanted)


def _fa3_metadata(plan: Any, call: DecodeCall, shared: dict[str, Any]) -> torch.Tensor | None:
    """None where this version plans otherwise: its op then plans in each call."""
    wanted = {
        **shared, "batch_size": call.batch, "max_seqlen_q": call.seqlen_q, "max_seqlen_k": call.room,
        "num_heads": call.heads, "num_heads_k": call.kv_heads, "headdim": call.k.shape[3],
        "headdim_v": call.v.shape[3], "qkv_dtype": call.q.dtype, "page_size": call.page or None,
        "has_softcap": bool(call.softcap),
    }  # fmt: skip
    try:
        found: torch.Tensor = plan(**fill(of_schema(plan._schema), wanted, ()))
    except Cannot:
        return None
    return found


def scale_of(call: DecodeCall) -> float:
    return 1.0 / math.sqrt(call.k.shape[3]) if call.scale is None else call.scale


# ---- FlashInfer -----------------------------------------------------------------------------------------------------


def through_flashinfer(flashinfer: Any) -> Prepare:
    """Its wrappers for paged caches, planned ahead: for decoding, and where a sequence has several rows for prefill."""

    def prepare(row: Row, inputs: Inputs) -> Serve:
        import torch

        _require(inputs.call)
        left, right = inputs.call.window
        if right > 0 or (left >= 0 and right < 0 and inputs.call.seqlen_q > 1):
            raise Cannot("it has no window right of the diagonal")
        workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=inputs.call.q.device)
        return once(lambda call: _planned(flashinfer, workspace, call))

    return prepare


def _planned(flashinfer: Any, workspace: torch.Tensor, call: DecodeCall) -> Run:
    cache, page, pages = _pages(call)
    width = call.window[0]
    given = {
        "sm_scale": scale_of(call), "window_left": width, "logits_soft_cap": call.softcap or None,
        "q_data_type": call.q.dtype, "kv_data_type": call.k.dtype,
    }  # fmt: skip
    sizes = call.heads, call.kv_heads, call.k.shape[3], page
    if not call.ragged and call.seqlen_q == 1:
        if call.v.shape[3] != call.k.shape[3]:
            raise Cannot("its decoding has one head_dim for k and v")
        large = call.heads // call.kv_heads >= _LARGE_GROUP
        decoder = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=large)
        decoder.plan(*pages, *sizes, **given)
        return lambda: decoder.run(call.q[:, 0], cache)[:, None]
    starts = call.cu_seqlens_q
    if starts is None:
        starts = _integers(range(0, (call.batch + 1) * call.seqlen_q, call.seqlen_q), call)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(starts, *pages, *sizes, head_dim_vo=call.v.shape[3], causal=call.window[1] == 0, **given)
    rows = call.q if call.ragged else call.q.flatten(0, 1)
    return lambda: wrapper.run(rows, cache).view_as(call.q)


def _pages(call: DecodeCall) -> tuple[tuple[torch.Tensor, ...], int, tuple[torch.Tensor, ...]]:
    """The cache, the rows of a page, and of each sequence: its first entry in the list of pages; the list; the rows of
    its last page."""
    lengths, cache, page = call.seqlens_k.tolist(), (call.k, call.v), call.page
    if not lengths or min(lengths) < 1:
        raise Cannot("it takes no sequence without keys")
    if call.page_table is not None:
        table = call.page_table.tolist()
    else:
        page, room = _PAGE, call.k.shape[1]
        if room % page or not (call.k.is_contiguous() and call.v.is_contiguous()):
            raise Cannot("it has paged caches alone, and this one has no rows for whole pages")
        cache = tuple(t.unflatten(1, (-1, page)).flatten(0, 1) for t in cache)
        of_sequence = range(call.batch) if call.cache_batch_idx is None else call.cache_batch_idx.tolist()
        table = [range(b * (room // page), (b + 1) * (room // page)) for b in of_sequence]
    counts = [-(-length // page) for length in lengths]
    starts = [0, *itertools.accumulate(counts)]
    used = [entry for entries, count in zip(table, counts, strict=True) for entry in entries[:count]]
    last = [(length - 1) % page + 1 for length in lengths]
    return cache, page, tuple(_integers(values, call) for values in (starts, used, last))


def _integers(values: Any, call: DecodeCall) -> torch.Tensor:
    import torch

    return torch.tensor(list(values), dtype=torch.int32, device=call.q.device)
