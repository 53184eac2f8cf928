"""The building blocks of the online softmax: maximum and sum of blocks, and their merge.

A softmax needs two numbers of a row, its maximum m and s = sum exp(x - m). Both can be had block by block, since
blocks merge: the maximum is that of the maxima, and each sum shrinks by exp(its maximum - the new one). Flash
attention is this merge, with a third number that shrinks alike: the sum of exp(x - m) v.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fagen.errors import InvalidArgument, InvalidType
from fagen.schema import integer, shown


class SoftmaxStats(NamedTuple):
    """Maximum and sum of exp(x - maximum), for each block of a dimension. Of -inf alone: -inf and 0, which merge into
    others without a trace. A NaN or +inf makes the sum NaN, as it makes a softmax."""

    max: torch.Tensor
    sum: torch.Tensor

    @property
    def logsumexp(self) -> torch.Tensor:
        """log of the sum of exp(x)."""
        return self.max + self.sum.log()


def softmax_stats(x: torch.Tensor, dim: int = -1, block: int | None = None) -> SoftmaxStats:
    """Maximum and sum of exp(x - maximum) of each block of so many elements along `dim`; of the whole if None.

    Both have as many elements along `dim` as there are blocks; the last one may be shorter. float32 for 16 bits. The
    maximum is a constant to autograd: what is made of the pair, as a softmax or a logsumexp, has the right gradient.
    """
    dim = dimension(x, dim)
    if not x.is_floating_point():
        raise InvalidType(f"x must be of a floating dtype, not {x.dtype}")
    if x.dim() == 0:
        raise InvalidArgument("x has no dimension to cut into blocks")
    length = x.shape[dim]
    if length == 0:
        raise InvalidArgument("x has no element along the dimension", f"it is {tuple(x.shape)}, dim {dim}")
    if block is None:
        block = length
    if wrong := integer(block, 1):
        raise InvalidArgument(f"block: {wrong}")
    x = (x if x.dtype == torch.float64 else x.float()).movedim(dim, -1)
    block = min(block, length)
    blocks = torch.nn.functional.pad(x, (0, -length % block), value=-math.inf).unflatten(-1, (-1, block))
    top = blocks.detach().amax(-1)
    total = (blocks - _reference(top)[..., None]).exp().sum(-1)
    return SoftmaxStats(top.movedim(-1, dim), total.movedim(-1, dim))


def merge_stats(*stats: SoftmaxStats, dim: int = -1) -> SoftmaxStats:
    """What the blocks along `dim` are together, as one block: of one set of stats, or of several.

    Any split of a row, merged in any order and any grouping, gives the same within rounding.
    """
    pairs = [_checked(pair) for pair in stats]
    if not pairs:
        raise InvalidArgument("nothing to merge", remedy="give what softmax_stats made")
    dim = dimension(pairs[0].max, dim)
    try:
        tops, sums = (torch.cat(parts, dim) for parts in zip(*pairs, strict=True))
    except RuntimeError as error:
        raise InvalidArgument("the stats do not fit together", str(error).splitlines()[0]) from error
    if tops.shape[dim] == 0:
        raise InvalidArgument("nothing to merge", f"the stats are {tuple(tops.shape)}, dim {dim}")
    top = tops.amax(dim, keepdim=True)
    return SoftmaxStats(top, (sums * (tops - _reference(top)).exp()).sum(dim, keepdim=True))


def _reference(top: torch.Tensor) -> torch.Tensor:
    """What to subtract: 0 where all are -inf, whose exponentials are then 0 and not NaN."""
    return torch.where(top == -math.inf, 0.0, top)


def _checked(pair: SoftmaxStats) -> SoftmaxStats:
    both = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(t, torch.Tensor) for t in pair)
    if not both:
        raise InvalidType(f"stats are pairs of tensors, maximum and sum, not {shown(pair)}")
    if pair[0].shape != pair[1].shape or pair[0].dim() == 0:
        raise InvalidArgument("maximum and sum differ in shape", f"{tuple(pair[0].shape)} and {tuple(pair[1].shape)}")
    return SoftmaxStats(*pair)


def dimension(x: torch.Tensor, dim: int) -> int:
    """A dimension of a tensor, counted from the front. A number has one, as in PyTorch."""
    if not isinstance(x, torch.Tensor):
        raise InvalidType(f"x must be a tensor, not {shown(x)}")
    if type(dim) is not int:
        raise InvalidType(f"dim must be an integer, not {shown(dim)}")
    most = max(x.dim(), 1)
    if not -most <= dim < most:
        raise InvalidArgument(f"dim {dim} is out of range", f"x has {x.dim()} dimensions: {-most} to {most - 1}")
    return dim % most
