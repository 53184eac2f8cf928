"""A plan for steps of decoding: how keys are cut for a batch whose lengths are known on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fagen.compat.kvcache import SplitKeys, flash_attn_with_kvcache
from fagen.dispatch import resolve
from fagen.errors import InvalidArgument
from fagen.ops.attention import arguments
from fagen.ops.attention.decode_problem import DecodeProblem
from fagen.target import Target, detect

_OWN = ("num_splits", "numerics", "max_seqlen_k")  # arguments that the plan gives


class DecodePlan:
    """Made once for all layers of a step, and for the steps after it while lengths change little.

    `problem` says what the steps are: its batch, and its seqlen_q and seqlen_k, the most rows and keys of a sequence.
    `lengths` are the keys of each sequence, numbers on the host. Blocks of the GPU get about as many keys each,
    whatever the lengths; `run` reads the lengths that there are then, on the device, so that a captured graph of it
    serves all lengths up to seqlen_k. On the CPU the kernel divides its work itself.

    split_keys  keys of a block, at most; 0: the kernel chooses
    """

    def __init__(self, problem: DecodeProblem, lengths: Sequence[int], target: Target | None = None) -> None:
        if not isinstance(problem, DecodeProblem):
            raise InvalidArgument(f"a plan is of a DecodeProblem, not {arguments.shown(problem)}")
        known = [arguments.integer("lengths", n) for n in lengths]
        if len(known) != problem.batch:
            raise InvalidArgument(f"there are {len(known)} lengths", f"the problem has batch={problem.batch}")
        for length in known:
            if not 0 <= length <= problem.seqlen_k:
                raise InvalidArgument(f"a length is {length}", f"the problem has seqlen_k={problem.seqlen_k}")
        self.problem, target = problem, target or detect()
        kernel = resolve.answer(problem, target, ours=True).kernel
        spec = None if kernel is None else kernel.spec
        self.split_keys = 0 if spec is None else spec.family.split_keys(problem, target, spec.config, known)

    def run(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **named: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`fagen.flash_attn_with_kvcache` with its arguments by name, but for those that the plan gives."""
        for name in _OWN:
            if name in named:
                raise InvalidArgument(f"{name} is the plan's to give", "", f"leave out {name}")
        if self.split_keys:
            named["numerics"] = SplitKeys(self.split_keys)
        return flash_attn_with_kvcache(q, k_cache, v_cache, max_seqlen_k=self.problem.seqlen_k, **named)
