"""The suites of the decode op: steps of a batch on a cache, of one length or of several, prompts among them."""

from __future__ import annotations

from random import Random
from typing import Any

from fagen.bench.ours import dispatched
from fagen.bench.peers import Serve
from fagen.bench.rows import Inputs, Row
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.target import Target

SUITES = {
    "decode": "with --op decode: one token a sequence on a contiguous cache; in fp8; four tokens; one kv head",
    "paged": "with --op decode: the same on pages of 16 and 64 rows, and some on pages of 1",
    "ragged": "with --op decode: 64 sequences of 128 to 64k keys, in pages",
    "mixed": "with --op decode: chunks of four prompts among 60 single tokens, in pages",
    "mla": "with --op decode: latent attention, 128 heads on one cache of 576 columns, in pages of 64",
}
_SHAPE: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128}
# batch, keys
_GPU = ((1, 1024), (1, 16384), (1, 131072), (16, 4096), (64, 1024), (64, 4096), (32, 16384))
_CPU = ((1, 4096), (4, 4096))
# batch, keys, heads, kv heads, head_dim: shapes of models
_MODELS = (
    (1, 1024, 32, 8, 128),
    (1, 8192, 32, 8, 128),
    (1, 65536, 64, 8, 128),
    (8, 4096, 32, 8, 128),
    (32, 4096, 32, 8, 128),
    (64, 8192, 64, 8, 128),
    (16, 8192, 64, 8, 64),
    (32, 2048, 32, 32, 128),
    (32, 4096, 16, 1, 256),
)
_PAGES = (16, 64)
# sequences, fewest and most keys, of a GPU and of a CPU
_RAGGED = {True: (64, 128, 65536), False: (8, 16, 1024)}
# prompts, rows of a chunk, single tokens, their keys
_MIXED = {True: (4, 2048, 60, 4096), False: (2, 64, 6, 256)}
# latent attention, of DeepSeek's models: batch, keys
_LATENT: dict[str, Any] = {"kv_heads": 1, "head_dim": 576, "head_dim_v": 512, "shared_kv": True, "page": 64}
_LATENT_GPU = (
    (1, 1024), (1, 4096), (1, 32768), (8, 4096), (16, 8192), (32, 2048), (32, 8192), (64, 4096), (64, 32768),
    (128, 1024), (128, 4096), (128, 32768),
)  # fmt: skip
_LATENT_CPU = ((1, 256), (2, 512))
_SEED = 0  # of the ragged lengths: they are part of what the row's name means


def suite(name: str, target: Target) -> list[Row]:
    if name in ("ragged", "mixed"):
        steps = _ragged_steps(target) if name == "ragged" else _mixed_steps(target)
        return [_of_steps(name, steps, page) for page in _PAGES]
    if name == "mla":
        return _latent(target)
    sizes = _GPU if target.is_gpu else _CPU
    plain = [(batch, keys, _SHAPE) for batch, keys in sizes]
    for batch, keys, heads, kv_heads, head_dim in _MODELS if target.is_gpu else ():
        plain.append((batch, keys, {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}))
    found = (_paged if name == "paged" else _contiguous)(plain, sizes)
    return list({row.name: row for row in found}.values())


def _contiguous(plain: list[tuple[int, int, dict[str, Any]]], sizes: tuple[tuple[int, int], ...]) -> list[Row]:
    found = [_row("", batch, keys, **shape) for batch, keys, shape in plain]
    found += [_row(" fp8", batch, keys, kv_dtype="fp8_e4m3", **_SHAPE) for batch, keys in sizes[1:]]
    found += [_row(" q4", batch, keys, seqlen_q=4, mask="causal", **_SHAPE) for batch, keys in sizes[1:]]
    return [*found, _row(" mqa", *sizes[-1], **{**_SHAPE, "kv_heads": 1})]


def _paged(plain: list[tuple[int, int, dict[str, Any]]], sizes: tuple[tuple[int, int], ...]) -> list[Row]:
    found = [_row(f" page{page}", batch, keys, page=page, **shape) for page in _PAGES for batch, keys, shape in plain]
    return [*found, *(_row(" page1", batch, keys, page=1, **_SHAPE) for batch, keys in sizes[1:])]


def _latent(target: Target) -> list[Row]:
    """All heads of a model; then two tokens a step, a share of the heads (of eight GPUs), a cache without pages."""
    sizes = _LATENT_GPU if target.is_gpu else _LATENT_CPU
    found = [_row(" mla", batch, keys, heads=128, **_LATENT) for batch, keys in sizes]
    batch, keys = (64, 4096) if target.is_gpu else (2, 256)
    found += [_row(" mla q2", batch, keys, heads=128, seqlen_q=2, mask="causal", **_LATENT)]
    found += [_row(" mla", batch, keys, heads=heads, **_LATENT) for heads in (16, 64)]
    return [*found, _row(" mla contiguous", batch, keys, heads=128, **{**_LATENT, "page": 0})]


def _row(kind: str, batch: int, keys: int, **fields: Any) -> Row:
    problem = DecodeProblem(batch=batch, seqlen_k=keys, **fields)
    series = f"decode{kind} b{batch} h{problem.heads}/{problem.kv_heads} d{problem.head_dim}"
    return Row(f"{series} k{keys}", problem, series)


def ours(row: Row, inputs: Inputs) -> Serve:
    from fagen.ops.attention import decode_reference

    return dispatched(inputs.call, lambda i: decode_reference.attend(i.call, i.call.q.dtype)[0])


def _ragged_steps(target: Target) -> list[tuple[int, int]]:
    """A token on lengths that are log-uniform, one drawn from each of equal parts; the most keys are among them."""
    count, fewest, most = _RAGGED[target.is_gpu]
    random = Random(_SEED)
    lengths = [round(fewest * (most / fewest) ** ((i + random.random()) / (count - 1))) for i in range(count - 1)]
    random.shuffle(lengths)
    lengths.insert(count // 2, most)
    return [(1, keys) for keys in lengths]


def _mixed_steps(target: Target) -> list[tuple[int, int]]:
    """Chunk after chunk of longer prompts, evenly spread among single tokens, the first chunk first."""
    prompts, chunk, tokens, keys = _MIXED[target.is_gpu]
    found = [(1, keys)] * tokens
    for i in range(prompts):
        found.insert(i * (tokens // prompts + 1), (chunk, chunk * (i + 1)))
    return found


def _of_steps(kind: str, steps: list[tuple[int, int]], page: int) -> Row:
    rows, keys = (max(column) for column in zip(*steps, strict=True))
    mask = "causal" if rows > 1 else "none"
    problem = DecodeProblem(batch=len(steps), seqlen_q=rows, seqlen_k=keys, mask=mask, page=page, **_SHAPE)
    series = f"{kind} page{page} b{problem.batch} h{problem.heads}/{problem.kv_heads} d{problem.head_dim}"
    return Row(f"{series} k{keys}", problem, series, steps=tuple(steps))
