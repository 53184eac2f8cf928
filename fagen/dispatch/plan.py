"""The plan of a static key on a device: which record, or which family's default, serves which size.

Rows are the records that may serve, each with its loaded kernel; so that a new size costs a look at the rows. The table
of `csrc/table.h` is given the same plan as words and does the same.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fagen import families, ops
from fagen.ops.base import Op, Problem
from fagen.runtime import binding
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.db.record import Record
    from fagen.families import Family
    from fagen.runtime.kernel import Kernel


@dataclass(frozen=True)
class Answer:
    """What serves a size: a kernel, or PyTorch where there is none. `known` is False where somebody must still ask."""

    known: bool
    kernel: Kernel | None = None

    @functools.cached_property
    def words(self) -> tuple[int, ...]:
        """For the table in C++: `answer_of` there."""
        if self.kernel is None:
            return int(self.known), 0, 0, 0
        return (int(self.known), *(self.kernel.library.address(name) for name in binding.FUNCTIONS))


ASK, TORCH = Answer(False), Answer(True)


@dataclass(frozen=True)
class PlannedRecord:
    """A record that may serve sizes of the static key."""

    record: Record
    elsewhere: bool  # tuned on another device
    features: tuple[float, ...]
    regime: bool
    answer: Answer
    where_torch_may: Answer | None = None  # what is faster than its kernel where PyTorch can be asked; None: nothing


@dataclass
class Plan:
    """What is known of a static key on a target. Rows lie in the order in which ties are settled."""

    problem: Any  # any of the static key
    target: Target
    rows: tuple[PlannedRecord, ...]
    families: tuple[Family, ...] = ()  # whose defaults serve where there are no rows of a size's regime
    meanwhile: Answer | None = None  # what serves all sizes until something is built, where no row can
    defaults: dict[Hashable, Answer] = field(default_factory=dict)

    @property
    def op(self) -> Op:
        return ops.get(self.problem.op)

    def find(self, problem: Problem, ours: bool) -> Answer:
        """`ours`: a kernel also where PyTorch is faster."""
        row = self.nearest(problem)
        if row is None:
            return self.meanwhile or self.defaults.get(self.reads(problem), ASK)
        if row.where_torch_may is not None and not ours and self.op.torch_serves(problem):
            return row.where_torch_may
        return row.answer

    def nearest(self, problem: Problem) -> PlannedRecord | None:
        """As `db.Database.candidates` orders them, and `Plan::nearest` of the table does."""
        if not self.rows:
            return None
        wanted, weights = tuple(self.op.features(problem, self.target.units).values()), tuple(self.op.weights.values())
        best: tuple[Any, ...] | None = None
        found, size, regime = None, problem.size_key, self.op.regime(problem, self.target)
        for row in self.rows:
            if row.regime != regime:
                continue
            distance = 0.0
            for weight, a, b in zip(weights, wanted, row.features, strict=True):
                distance += weight * abs(a - b)
            rank = row.elsewhere, row.record.problem.size_key != size, distance
            if best is None or rank < best:
                best, found = rank, row
        return found

    def reads(self, problem: Problem) -> Hashable:
        """All that the families' defaults look at."""
        return tuple(family.default_reads(problem, self.target) for family in self.families)

    @functools.cached_property
    def _where_torch_may(self) -> int:
        """Nowhere, everywhere, or at sizes with as many rows as keys: 0, 1, 2."""
        square, oblong = (self.problem.replace(seqlen_q=8, seqlen_k=keys) for keys in (8, 16))
        return 0 if not self.op.torch_serves(square) else 1 if self.op.torch_serves(oblong) else 2

    def _default_of(self, regime: bool) -> Answer:
        """What serves sizes of a regime that has no rows, where the defaults look at nothing else."""
        known: dict[Any, bool | None] = {families.nothing: None, self.op.regime: regime}
        if self.meanwhile or any(family.default_reads not in known for family in self.families):
            return self.meanwhile or ASK
        return self.defaults.get(tuple(known[family.default_reads] for family in self.families), ASK)

    def words(self, ours: bool) -> list[int]:
        """For the table in C++, which reads them in `plan_of`."""
        windowed = self.problem.mask in ("window", "intervals")
        torch = 0 if ours else self._where_torch_may
        few_rows = binding.few_rows_limits(self.op, self.target)
        words = [self.target.units, int(windowed), torch, *few_rows]
        words += [*self._default_of(regime=False).words, *self._default_of(regime=True).words]
        for row in self.rows:
            p = row.record.problem
            sizes = p.batch, p.heads, p.kv_heads, p.seqlen_q, p.seqlen_k, p.window_left, p.window_right
            words += [int(row.elsewhere), *sizes, *row.answer.words, *(row.where_torch_may or row.answer).words]
        return words
