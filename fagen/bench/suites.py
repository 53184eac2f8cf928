"""The suites: named lists of rows. A row's name says all that it measures, so that results can be compared by it.

Lengths and batch share 16384 tokens and heads and head_dim share 2048 columns, unless a row is a model's layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

from fagen.bench import decode, fp8, random_rows, softmax
from fagen.bench.rows import TRAINING, Row, of_problem, row_of_op
from fagen.errors import UsageError
from fagen.ops.attention.problem import Problem
from fagen.ops.softmax.problem import DIRECTIONS
from fagen.target import Target

TOKENS = 16384
_CROSS = "cross-512x8192"
_MASKS = {"full": "none", "causal": "causal"}  # of a row's name: of a problem
_GRID = {(64, 64): 32, (96, 96): 21, (128, 128): 16, (192, 128): 10, (256, 256): 8}  # head dims: heads
_LENGTHS = (512, 2048, 8192)

# name, length, batch, heads, kv heads, head_dim; all causal
_LAYERS = (
    ("llama3-8b", 8192, 1, 32, 8, 128),
    ("llama3-70b", 4096, 1, 64, 8, 128),
    ("qwen3-4b", 2048, 4, 32, 8, 128),
    ("gpt2-small", 1024, 32, 12, 12, 64),
    ("gemma-d256", 8192, 1, 16, 8, 256),
    ("small-b1-s512", 512, 1, 16, 16, 64),
    ("small-b1-s1k", 1024, 1, 32, 8, 128),
    ("bert-b32-s128", 128, 32, 12, 12, 64),
)
# name, heads, kv heads, head dims of q/k and v, keys that a sliding layer sees before its own (-1: not sliding)
_MODELS = (
    ("llama3.2-1b", 32, 8, (64, 64), -1),
    ("llama3-8b", 32, 8, (128, 128), -1),
    ("llama3-70b", 64, 8, (128, 128), -1),
    ("qwen3-4b", 32, 8, (128, 128), -1),
    ("phi3-mini", 32, 32, (96, 96), -1),
    ("gemma3-4b", 8, 4, (256, 256), -1),
    ("gemma3-4b-sliding", 8, 4, (256, 256), 1023),
    ("gpt-oss-20b", 64, 8, (64, 64), -1),
    ("gpt-oss-20b-sliding", 64, 8, (64, 64), 127),
    ("deepseek-v3-prefill", 128, 128, (192, 128), -1),
)
_MODEL_LENGTHS = (1024, 4096, 16384)

# Eight documents in 16384 tokens, drawn at random once.
DOCUMENTS = (4441, 1689, 4331, 1107, 841, 875, 2413, 687)
WINDOW = 1024  # keys before a row's own, which it sees as well: 1025 in all, as (1024, 0) means everywhere
PREFIX = 4096
# rows, keys, batch, heads, kv heads, head_dim, mask; first three of random rows that were behind a peer
_FEW_ROWS = (
    (1113, 10017, 4, 1, 1, 112, "causal"),
    (135, 607, 64, 32, 8, 112, "causal"),
    (87, 783, 1, 56, 8, 72, "none"),
    (16, 1024, 1, 8, 8, 128, "causal"),
    (16, 4096, 4, 32, 8, 128, "causal"),
    (16, 32768, 1, 32, 8, 128, "causal"),
    (17, 8192, 2, 16, 2, 64, "none"),
    (32, 16384, 1, 16, 4, 256, "causal"),
    (64, 2048, 1, 12, 12, 64, "none"),
    (64, 32768, 1, 8, 1, 128, "none"),
    (100, 500, 2, 16, 16, 64, "causal"),
    (128, 1024, 1, 16, 16, 128, "none"),
    (128, 8192, 1, 32, 8, 128, "causal"),
    (200, 5000, 1, 4, 4, 256, "none"),
    (256, 4096, 1, 16, 16, 64, "causal"),
    (256, 16384, 2, 8, 2, 128, "causal"),
    (300, 3000, 1, 6, 2, 128, "none"),
    (512, 2048, 1, 8, 8, 128, "causal"),
    (512, 32768, 1, 8, 8, 128, "causal"),
    (700, 7000, 1, 2, 1, 256, "causal"),
    (1024, 1024, 1, 4, 4, 128, "none"),
    (1024, 16384, 1, 4, 4, 64, "causal"),
    (1500, 12000, 1, 2, 2, 128, "none"),
)
_LARGE = {(320, 320): 6, (384, 384): 5, (512, 512): 4, (576, 512): 4, (640, 640): 3, (768, 768): 3, (1024, 1024): 2}
_LARGE_LENGTHS = (1024, 4096, 16384)
# head dims that are multiples of 8 alone, each beside the next multiple of 16: heads of both
_ODD = {(40, 48): 40, (72, 80): 24, (88, 96): 20, (104, 112): 18, (120, 128): 16}
_ODD_LENGTHS = (2048, 8192)
_EQUAL_DIMS = (((64, 64), 32), ((128, 128), 16), ((256, 256), 8))  # head dims, heads
_DOCUMENT_SHAPES = ((16, 16, 128), (32, 8, 128), (32, 32, 64))  # heads, kv heads, head_dim
_SHAPE: dict[str, Any] = {"heads": 16, "head_dim": 128}  # of the mask rows


def _dims(of_qk: int, of_v: int) -> str:
    return f"d{of_qk}" if of_qk == of_v else f"d{of_qk}-{of_v}"


def _peers() -> list[Row]:
    rows = [
        _grid_row(dims, heads, mask, length) for dims, heads in _GRID.items() for mask in _MASKS for length in _LENGTHS
    ]
    rows += [_layer(name, length, batch, h, kv, (d, d)) for name, length, batch, h, kv, d in _LAYERS]
    cross = Problem(head_dim=128, heads=32, kv_heads=8, seqlen_q=512, seqlen_k=8192)
    return [*rows, Row(f"{_CROSS} full h32/8 d128", cross, _CROSS)]


def _grid_row(dims: tuple[int, int], heads: int, mask: str, length: int) -> Row:
    problem = Problem(
        head_dim=dims[0], head_dim_v=dims[1], mask=_MASKS[mask], batch=TOKENS // length, heads=heads, seqlen_q=length
    )
    series = f"{_dims(*dims)} {mask}"
    return Row(f"{series} s{length} b{problem.batch} h{heads}", problem, series)


def _fp32() -> list[Row]:
    found = []
    for head_dim in (32, 64, 128, 256):
        for mask in _MASKS:
            for length in (512, 1024, 2048, 4096):
                problem = Problem(
                    dtype="fp32", head_dim=head_dim, mask=_MASKS[mask], batch=8192 // length,
                    heads=1024 // head_dim, seqlen_q=length,
                )  # fmt: skip
                series = f"fp32 d{head_dim} {mask}"
                found.append(Row(f"{series} s{length} b{problem.batch} h{problem.heads}", problem, series))
    return found


def _large_d() -> list[Row]:
    rows = [
        _grid_row(dims, heads, mask, n) for dims, heads in _LARGE.items() for mask in _MASKS for n in _LARGE_LENGTHS
    ]
    return [*rows, _layer("gqa-d512", 8192, 1, 16, 4, (512, 512))]


def _odd_d() -> list[Row]:
    return [
        _grid_row((d, d), heads, mask, length)
        for pair, heads in _ODD.items()
        for mask in _MASKS
        for length in _ODD_LENGTHS
        for d in pair
    ]


def _few_rows() -> list[Row]:
    found = []
    for rows, keys, batch, heads, kv_heads, head_dim, mask in _FEW_ROWS:
        problem = Problem(
            head_dim=head_dim, mask=mask, batch=batch, heads=heads, kv_heads=kv_heads, seqlen_q=rows, seqlen_k=keys
        )
        seen = "full" if mask == "none" else mask
        name = f"q{rows} k{keys} {seen} b{batch} h{heads}/{kv_heads} d{head_dim}"
        found.append(Row(name, problem, name))
    return found


def _layer(name: str, length: int, batch: int, heads: int, kv_heads: int, dims: tuple[int, int], left: int = -1) -> Row:
    mask, right = ("causal", -1) if left < 0 else ("window", 0)
    problem = Problem(
        head_dim=dims[0], head_dim_v=dims[1], mask=mask, batch=batch, heads=heads, kv_heads=kv_heads,
        seqlen_q=length, window_left=left, window_right=right,
    )  # fmt: skip
    seen = "causal" if left < 0 else f"window{left}"
    return Row(f"{name} {seen} s{length} b{batch} h{heads}/{kv_heads} {_dims(*dims)}", problem, name)


def _models() -> list[Row]:
    rows = [_layer(name, length, batch, h, kv, (d, d)) for name, length, batch, h, kv, d in _LAYERS]
    rows += [
        _layer(name, length, TOKENS // length, heads, kv_heads, dims, left)
        for name, heads, kv_heads, dims, left in _MODELS
        for length in _MODEL_LENGTHS
    ]
    return list({row.name: row for row in rows}.values())


def _masks() -> list[Row]:
    return [
        window_row("window1024", TOKENS, WINDOW),
        documents_row("doc8-causal", DOCUMENTS, causal=True),
        documents_row("doc8-full", DOCUMENTS, causal=False),
        prefix_row("prefix4096", TOKENS, PREFIX),
    ]


def window_row(name: str, length: int, left: int, **shape: Any) -> Row:
    shape = _SHAPE | shape
    return Row(name, Problem(mask="window", window_left=left, window_right=0, seqlen_q=length, **shape), name)


def documents_row(name: str, lengths: tuple[int, ...], *, causal: bool, **shape: Any) -> Row:
    shape = _SHAPE | {"window_right": 0 if causal else -1} | shape
    kind = "lower1" if causal else "both2"
    problem = Problem(mask="intervals", intervals=kind, seqlen_q=sum(lengths), **shape)
    return Row(name, problem, name, documents=lengths)


def prefix_row(name: str, length: int, prefix: int, **shape: Any) -> Row:
    shape = _SHAPE | shape
    return Row(name, Problem(mask="intervals", intervals="both2", seqlen_q=length, **shape), name, prefix=prefix)


# ---- training -------------------------------------------------------------------------------------------------------


def _training() -> list[Row]:
    found = [_layer(name, length, batch, h, kv, (d, d)) for name, length, batch, h, kv, d in _LAYERS]
    found += [_layer("gpt-oss-20b", 4096, 4, 64, 8, (64, 64), left) for left in (-1, 127)]
    found.append(_layer("llama3-8b", TOKENS, 1, 32, 8, (128, 128)))
    return [*found, *(_grid_row(dims, heads, "causal", TOKENS) for dims, heads in _EQUAL_DIMS)]


def _same_bits() -> list[Row]:
    found = [_grid_row(dims, heads, mask, 8192) for dims, heads in _EQUAL_DIMS for mask in _MASKS]
    return [*found, _grid_row((128, 128), 16, "causal", 2048), *_masks()[:3]]


def _dropout() -> list[Row]:
    found = [_grid_row(dims, heads, mask, 2048) for dims, heads in _EQUAL_DIMS for mask in _MASKS]
    found.append(_layer("llama3-8b", 8192, 1, 32, 8, (128, 128)))
    return [
        replace(
            row, name=f"{row.name} dropout", series=f"{row.series} dropout", problem=row.problem.replace(dropout=True)
        )
        for row in found
    ]


def _documents() -> list[Row]:
    found = []
    for heads, kv_heads, head_dim in _DOCUMENT_SHAPES:
        name = f" h{heads}/{kv_heads} d{head_dim}"
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        found += [
            window_row(f"window{WINDOW}{name}", TOKENS, WINDOW, **shape),
            documents_row(f"doc8-causal{name}", DOCUMENTS, causal=True, **shape),
            documents_row(f"doc8-full{name}", DOCUMENTS, causal=False, **shape),
        ]
    return found


def _varlen() -> list[Row]:
    """Sequences of random lengths: where they begin is seldom where a tile does."""
    found = []
    for heads, kv_heads, head_dim in _DOCUMENT_SHAPES:
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        for count in (1, 4, 16, 64):
            starts = sorted(Random(count).sample(range(1, TOKENS), count - 1))
            lengths = tuple(b - a for a, b in pairwise((0, *starts, TOKENS)))
            row = documents_row(f"varlen{count} causal h{heads}/{kv_heads} d{head_dim}", lengths, causal=True, **shape)
            found.append(replace(row, packed=True))
    return found


def _ampere() -> list[Row]:
    return [
        _grid_row((head_dim, head_dim), 2048 // head_dim, mask, length)
        for head_dim in (64, 128, 256)
        for mask in _MASKS
        for length in (1024, 4096, TOKENS)
    ]


# ---- all of them ----------------------------------------------------------------------------------------------------


def _small(target: Target) -> list[Row]:
    from fagen.ops.attention import suite as tuned

    return [of_problem(problem) for problem in tuned.default(target)]


@dataclass(frozen=True)
class Suite:
    about: str
    rows: Callable[[Target, int, str, bool], list[Row]]  # of a device, a seed, --op and --deterministic
    ops: tuple[str, ...]  # what --op may say


def _attention(
    about: str, forward: Callable[[Target, int], list[Row]], without: Mapping[str, tuple[str, ...]] | None = None,
    ops: tuple[str, ...] = ("forward", "backward", TRAINING), always_same_bits: bool = False,
) -> Suite:  # fmt: skip
    """Rows of forward, whose sizes backward takes over; `without` names the series that an op leaves out."""

    def rows(target: Target, seed: int, op: str, same_bits: bool) -> list[Row]:
        left_out = (without or {}).get(op, ())
        found = [row for row in forward(target, seed) if row.series not in left_out]
        return [row_of_op(row, op, same_bits=same_bits or always_same_bits) for row in found]

    return Suite(about, rows, ops)


def _of_decode(name: str) -> Suite:
    return Suite(decode.SUITES[name], lambda target, seed, op, same_bits: decode.suite(name, target), ("decode",))


SUITES = {
    "peers": _attention(
        "the head_dim grid at three lengths, eight models' layers, a cross-attention: 39 rows",
        lambda target, seed: _peers(),
        without={"backward": (_CROSS,), TRAINING: (_CROSS,)},  # nobody trains by it
    ),
    "models": _attention("the layers of well-known models at several lengths", lambda target, seed: _models()),
    "masks": _attention("window, packed documents, prefix LM at 16k", lambda target, seed: _masks()),
    "random": _attention(
        "60 problems drawn by --seed, that nobody tuned", lambda target, seed: random_rows.suite(seed)
    ),
    "few_rows": _attention(
        "few rows of q on many keys, where tiles of rows alone leave SMs idle: 23 rows",
        lambda target, seed: _few_rows(),
    ),
    "large-d": _attention(
        "head dims 320 to 1024 at lengths 1k, 4k and 16k, and grouped heads of 512: 43 rows",
        lambda target, seed: _large_d(),
    ),
    "odd-d": _attention(
        "head dims 40 to 120 that are multiples of 8 alone, each beside the next multiple of 16: 40 rows",
        lambda target, seed: _odd_d(),
    ),
    "training": _attention(
        "models' layers as they are trained, three at 16k for their memory", lambda target, seed: _training()
    ),
    "deterministic": _attention(
        "gradients of the same bits each time: 8k, and window and documents at 16k",
        lambda target, seed: _same_bits(),
        ops=("backward", TRAINING),
        always_same_bits=True,
    ),
    "dropout": _attention("a tenth of the weights dropped", lambda target, seed: _dropout()),
    "documents": _attention("window and packed documents at 16k, three shapes", lambda target, seed: _documents()),
    "varlen": _attention("16k tokens in 1, 4, 16 and 64 sequences, three shapes", lambda target, seed: _varlen()),
    "ampere": _attention(
        "head dims 64, 128 and 256 from 1k to 16k, for kernels of sm_80", lambda target, seed: _ampere()
    ),
    "small": _attention("a small suite, for a CPU", lambda target, seed: _small(target)),
    **{name: _of_decode(name) for name in decode.SUITES},
    "fp32": _attention("float32 at head dims 32 to 256, lengths 512 to 4096: 32 rows", lambda target, seed: _fp32()),
    "fp8": Suite(
        "forward on fp8 numbers at head dims 64, 128 and 256, lengths 512 to 16k: 36 rows",
        lambda target, seed, op, same_bits: fp8.suite(),
        ("forward", "forward_fp8"),
    ),
    "softmax": Suite(
        "fagen.softmax, along rows from 128 to 1 M and along columns; with --op backward its gradient",
        lambda target, seed, op, same_bits: softmax.suite(target, op),
        DIRECTIONS,
    ),
}
_DEFAULTS = {"decode": "decode", "forward_fp8": "fp8"}  # of the other ops it depends on the device
_ON_GPUS = {TRAINING: "training"}


def suite(name: str, target: Target, seed: int = 0, op: str = "forward", *, same_bits: bool = False) -> list[Row]:
    """The rows of a suite for what --op says."""
    found = SUITES[name]
    if op not in found.ops:
        having = [name for name, other in SUITES.items() if op in other.ops]
        numbers = f"it has rows of {' and '.join(found.ops)}"
        raise UsageError(f"suite {name} has no rows of {op}", numbers, f"for {op}: --suite {', '.join(having)}")
    return found.rows(target, seed, op, same_bits)


def default(target: Target, op: str = "forward") -> str:
    return _DEFAULTS.get(op) or (_ON_GPUS.get(op, "peers") if target.is_gpu else "small")
