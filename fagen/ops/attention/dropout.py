"""Which weights dropout drops, in PyTorch. templates/include/fagen/common/philox.h is the same in C++.

A weight's random number depends on the seed, the offset, its head, row and key alone, so that no config, family or
tile can change the mask, and backward makes forward's again. One call of Philox gives a byte each to 16 weights.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments

_WORD = 0xFFFFFFFF
_MULTIPLIERS, _WEYL, _ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 7
_LARGEST = 2**63 - 1


def draw(device: torch.device) -> torch.Tensor:
    """Seed and offset by PyTorch's generator of the device, which manual_seed sets and checkpoints restore."""
    return torch.randint(0, _LARGEST, (2,), dtype=torch.int64, device=device)


def check(rng: Any, device: torch.device) -> None:
    """Raise InvalidArgument for what is no seed and offset."""
    arguments.dense("rng", rng)
    if rng.dtype != torch.int64 or tuple(rng.shape) != (2,) or rng.device != device or not rng.is_contiguous():
        raise InvalidArgument(
            f"rng must be int64 (2) on {device}", f"it is {rng.dtype} {tuple(rng.shape)} on {rng.device}"
        )


def kept_of(rate: float) -> int:
    """Of 256 values of a byte, how many keep a weight: `Dropout::kept_of`, in float32 as there."""
    rate = _float32(rate)
    if not 0 < rate < 1:
        return 256 if rate <= 0 else 0
    return min(max(int(_float32(_float32(1 - rate) * 256 + 0.5)), 1), 255)


def scale_of(rate: float) -> float:
    """What kept weights are multiplied by, so that the expectation is that without dropout."""
    kept = kept_of(rate)
    return 256 / kept if kept else 0.0


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def factors(
    rate: float, rng: torch.Tensor, planes: tuple[int, int, int], rows: range, keys: range, dtype: torch.dtype
) -> torch.Tensor:
    """What the weights of some rows and keys are multiplied by, (batch, heads, rows, keys).

    `planes` are the first head's number among all of all batches, the batches and the heads.
    """
    return kept(rate, rng, planes, rows, keys).to(dtype) * scale_of(rate)


def kept(rate: float, rng: torch.Tensor, planes: tuple[int, int, int], rows: range, keys: range) -> torch.Tensor:
    """Which weights are kept, as bools."""
    first, batch, heads = planes
    row_blocks = range(rows.start // 16, -(-rows.stop // 16))
    key_blocks = range(keys.start // 16, -(-keys.stop // 16))

    def numbers(begin: int, count: int) -> torch.Tensor:
        return torch.arange(begin, begin + count, device=rng.device, dtype=torch.int64)

    plane = numbers(first, batch * heads)[:, None, None]
    of_row = numbers(row_blocks.start * 4, len(row_blocks) * 4)[:, None]
    of_key = numbers(key_blocks.start * 4, len(key_blocks) * 4)
    words = _philox(rng[0], of_row, of_key, plane, rng[1] & _WORD)
    shape = torch.broadcast_shapes(*(word.shape for word in words))
    # 32-bit words as four bytes, the lowest first: words are of rows (row % 2, row / 8), bytes of keys likewise
    parts = [torch.stack([word.expand(shape) >> 8 * byte & 255 for byte in range(4)], dim=-1) for word in words]
    cells = torch.stack(parts, dim=-2).to(torch.uint8)  # (plane, row calls, key calls, word, byte)
    cells = cells.reshape(batch, heads, len(row_blocks), 4, len(key_blocks), 4, *(2, 2), *(2, 2))
    cells = cells.permute(0, 1, *(2, 7, 3, 6), *(4, 8, 5, 9))  # block, half of it, pair, which of the pair
    cells = cells.reshape(batch, heads, len(row_blocks) * 16, len(key_blocks) * 16)
    row, key = rows.start - row_blocks.start * 16, keys.start - key_blocks.start * 16
    return cells[:, :, row : row + len(rows), key : key + len(keys)] < kept_of(rate)


def _philox(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Philox4x32-7, of 32-bit numbers held in 64 bits. A product wraps around as it does without a sign."""
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD, (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3
