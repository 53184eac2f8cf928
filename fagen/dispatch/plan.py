"""The plan of a static key on a device: which record, or which family's default, serves which size.

Rows are the records that may serve, each with its loaded kernel; so that a new size costs a look at the rows. The table
of `csrc/table.h` is given the same plan as words and does the same.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fagen import ops
from fagen.db.store import ELSEWHERE
from fagen.families import Reads
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
    regime: int
    answer: Answer
    where_torch_may: Answer | None = None  # what is faster than its kernel where PyTorch can be asked; None: nothing
    # the family whose default serves in the place of each of the two at other sizes: see `choose.confirmed`
    confirms: str = ""
    may_confirm: str = ""


@dataclass
class Plan:
    """What is known of a static key on a target. Rows lie in the order in which ties are settled."""

    problem: Any  # any of the static key
    target: Target
    rows: tuple[PlannedRecord, ...]
    families: tuple[Family, ...] = ()  # whose defaults serve where there are no rows of a size's regime
    meanwhile: Answer | None = None  # what serves all sizes until something is built, where no row can
    defaults: dict[tuple[Any, ...], Answer] = field(default_factory=dict)  # by what they read of a size

    @property
    def op(self) -> Op:
        return ops.get(self.problem.op)

    def find(self, problem: Problem, ours: bool) -> Answer:
        """`ours`: a kernel also where PyTorch is faster."""
        row = self.nearest(problem)
        if row is None:
            return self.meanwhile or self.defaults.get(self.reads(problem), ASK)
        confirms, answer = row.confirms, row.answer
        if row.where_torch_may is not None and not ours and self.op.torch_serves(problem):
            confirms, answer = row.may_confirm, row.where_torch_may
        if confirms and row.record.problem.size_key != problem.size_key:
            return self.defaults.get(self.reads(problem, confirms), ASK)
        return answer

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
            rank = distance + ELSEWHERE * row.elsewhere, row.elsewhere, row.record.problem.size_key != size
            if best is None or rank < best:
                best, found = rank, row
        return found

    def reads(self, problem: Problem, only: str = "") -> tuple[Any, ...]:
        """All that the families' defaults look at, or that of one of them."""
        return only, *(family.default_reads(problem, self.target) for family in self._asked(only))

    def _asked(self, only: str) -> list[Family]:
        return [family for family in self.families if only in ("", family.name)]

    @functools.cached_property
    def _where_torch_may(self) -> int:
        """Nowhere, everywhere, or at sizes with as many rows as keys: 0, 1, 2."""
        square, oblong = (self.problem.replace(seqlen_q=8, seqlen_k=keys) for keys in (8, 16))
        return 0 if not self.op.torch_serves(square) else 1 if self.op.torch_serves(oblong) else 2

    def _default_words(self, only: str) -> list[int]:
        """`Defaults` there: its tests, and the answers by those that hold."""
        if only == "" and self.meanwhile:
            return [0, 1, 0, *self.meanwhile.words]
        asked = [family.default_reads for family in self._asked(only)]
        reads = [each for each in asked if isinstance(each, Reads)]
        if len(reads) < len(asked):
            return [-1, 0]
        tests = [test for each in reads for test in each.tests(self.problem, self.target)]
        known = [(key, answer) for key, answer in self.defaults.items() if key[0] == only]
        words = [len(tests), len(known), *(word for test in tests for word in test.words)]
        for (_, *holds), answer in known:
            bits = sum(1 << i for i, held in enumerate(itertools.chain(*holds)) if held)
            words += [bits, *answer.words]
        return words

    def words(self, ours: bool) -> list[int]:
        """For the table in C++, which reads them in `plan_of`."""
        windowed = self.problem.mask in ("window", "intervals")
        torch = 0 if ours else self._where_torch_may
        named = [name for row in self.rows for name in (row.confirms, row.may_confirm)]
        speakers = list(dict.fromkeys(["", *named]))
        words = [self.target.units, int(windowed), torch, *binding.regime_limits(self.op, self.target)]
        words.append(len(speakers))
        for name in speakers:
            words += self._default_words(name)
        for row in self.rows:
            p = row.record.problem
            sizes = p.batch, p.heads, p.kv_heads, p.seqlen_q, p.seqlen_k, p.window_left, p.window_right
            may, may_confirm = row.answer, row.confirms
            if row.where_torch_may is not None:
                may, may_confirm = row.where_torch_may, row.may_confirm
            words += [int(row.elsewhere), *sizes, speakers.index(row.confirms), speakers.index(may_confirm)]
            words += [*row.answer.words, *may.words]
        return words
