"""Which kernel serves a problem: a recorded winner, else a family's default, else PyTorch. Never tunes, never lies."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fagen import families, ops
from fagen.codegen.spec import KernelSpec
from fagen.dispatch import freshness
from fagen.errors import FagenError
from fagen.ops.base import Problem
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.db.record import Record
    from fagen.dispatch.freshness import Freshness
    from fagen.families import Config, Family


PROVENANCES = {
    "exact": "tuned on this device for exactly this size",
    "nearest": "tuned on this device for the nearest size",
    "arch": "tuned on another device of this architecture",
    "confirmed": "never tuned: the family's default, as won at the nearest size",
    "default": "never tuned: the family's default",
    "built": "built already; it serves while the kernel of the choice is compiled",
    "none": "no kernel of ours",
}
_MOST_WRONG = 2  # winners of a changed source that one call verifies in vain
_MAX_REASONS = 4  # of records that were passed over; a database has thousands


@dataclass(frozen=True)
class Choice:
    """What serves a problem, and why each other choice does not."""

    provenance: str  # a key of PROVENANCES
    spec: KernelSpec | None = None  # None: PyTorch
    record: Record | None = None
    reasons: list[str] = field(default_factory=list)
    trust: Freshness | None = None  # of the record: whether its source is still what was tuned

    @property
    def kind(self) -> str:
        return "family" if self.spec else "torch"

    @property
    def family(self) -> Family | None:
        return self.spec.family if self.spec else None

    @property
    def config(self) -> Config | None:
        return self.spec.config if self.spec else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "family": self.spec.family.name if self.spec else None,
            "config": dict(self.spec.config) if self.spec else None,
            "provenance": self.provenance,
            "record": self.record.key if self.record else None,
            "source": self.trust.state if self.trust else None,
            "reasons": self.reasons,
        }


def choose(
    problem: Problem, target: Target, *, check: bool = False, stale: str = "", ours: bool = False, idle: bool = False
) -> Choice:
    """An exact record, the nearest, one of the same arch, the first able family's default, the next one's, PyTorch.

    A record of another size whose config is only the default there speaks for the default: see `confirmed`.

    PyTorch comes first where it was faster than the record's kernel when that was tuned, unless a kernel of `ours` is
    wanted in any case. `check` verifies a record whose kernel source has changed since it was tuned, if nobody has yet;
    that builds and runs it. `stale` stands for FAGEN_STALE. With `idle`, families that serve no calls are asked too.
    """
    from fagen.db.store import Database

    able, refusals = (families.candidates if idle else families.serving)(problem, target)
    reasons = [f"{name}: {reason}" for name, reason in refusals.items()]
    if not able:
        return Choice("none", reasons=reasons)
    skipped = wrong = 0
    beaten: tuple[Record, str] | None = None
    for record, provenance in Database.load().candidates(problem, target):
        if beaten and not beats_torch(record, beaten[0]):
            continue
        torch_first = not ours and not beaten and lost(record, provenance) and ops.get(problem.op).torch_serves(problem)
        default = confirmed(record, provenance, problem, target, able)
        verify = check and not torch_first and default is None  # the default is not what was tuned
        choice, reason = by_record(record, provenance, problem, target, able, refusals, check=verify, stale=stale)
        if torch_first and not reason:
            beaten = record, provenance
            continue
        if not reason:
            _say_runners_up(reasons, problem, provenance, skipped)
            if default is not None:
                told = f"{provenance} record {record.key} ({record.family}): its config is but the default of that size"
                choice = Choice("confirmed", default, record, reasons=[told])
            return replace(choice, reasons=[*reasons, *choice.reasons])
        wrong += choice.trust is not None and choice.trust.state == "wrong"
        if wrong == _MOST_WRONG:  # something is amiss with the template: others would cost a compilation each
            stale = "refuse"
        skipped += 1
        if skipped <= _MAX_REASONS:
            reasons.append(f"{provenance} record {record.key} ({record.family}): {reason}")
    if beaten:
        return _by_torch(*beaten, problem, skipped, reasons)
    _say_runners_up(reasons, problem, "default", skipped)
    return by_default(problem, target, able, reasons)


def by_record(
    record: Record, provenance: str, problem: Problem, target: Target, able: list[Family], refusals: dict[str, str],
    *, check: bool = False, stale: str = "",
) -> tuple[Choice, str]:  # fmt: skip
    """What a record's config makes of the problem, and why it may not serve, "" if it may. No size decides that."""
    family = next((f for f in able if f.name == record.family), None)
    if family is None:
        return Choice(provenance, record=record), refusals.get(record.family, "no such family")
    config, reason = _legal(record, family, problem, target)
    if config is None:
        return Choice(provenance, record=record), reason
    spec = KernelSpec(family, problem, target, config)
    told = freshness.check(record, spec, check=check, stale=stale)
    return Choice(provenance, spec, record, trust=told), "" if told.usable else told.text


def confirmed(
    record: Record, provenance: str, problem: Problem, target: Target, able: list[Family]
) -> KernelSpec | None:
    """The default of a problem that was not tuned, where the record found none better at a size whose default is
    another; None where the record's own config serves."""
    family = next((f for f in able if f.name == record.family), None)
    if provenance == "exact" or family is None or not confirms(record, family, target):
        return None
    config = default_of(family, problem, target)
    if config is None or config == family.config(record.config):
        return None
    return KernelSpec(family, problem, target, config)


def confirms(record: Record, family: Family, target: Target) -> bool:
    """Whether a record's config is only its size's default, and other sizes may have another."""
    if family.default_reads is families.nothing:
        return False
    try:
        return family.config(record.config) == default_of(family, record.problem, target)
    except FagenError:
        return False


@functools.lru_cache(4096)
def default_of(family: Family, problem: Problem, target: Target) -> Config | None:
    """The family's default if it is legal."""
    try:
        return family.require(problem, target, family.default(problem, target))
    except FagenError:
        return None


def known_only() -> str:
    """For `stale`: a call that must not wait verifies nothing."""
    return freshness.KNOWN if freshness.mode() == "verify" else ""


def by_default(problem: Problem, target: Target, able: list[Family], reasons: list[str]) -> Choice:
    """The default of the first family whose default fits, of those that suit the sizes first; `reasons` grow."""
    for family in sorted(able, key=lambda family: not family.suits(problem)):
        try:
            config = family.require(problem, target, family.default(problem, target))
        except FagenError as error:
            reasons.append(f"{family.name}: its default does not fit: {error.what}")
            continue
        return Choice("default", KernelSpec(family, problem, target, config), reasons=reasons)
    return Choice("none", reasons=reasons)


def _legal(record: Record, family: Family, problem: Problem, target: Target) -> tuple[Config | None, str]:
    """The record's config if it is legal for the problem, else why not."""
    try:
        config = family.config(record.config)
    except FagenError as error:
        return None, error.what
    reason = ": ".join(family.rejects(problem, target, config) or ())
    return (None, reason) if reason else (config, "")


def lost(record: Record, provenance: str) -> bool:
    """Whether PyTorch was faster than this kernel on this device, where it can be asked as it was then."""
    from fagen.timing import timer  # what it imports takes milliseconds

    slower = provenance != "arch" and timer.lost(record.seconds, record.spread, record.torch_seconds)
    return slower and ops.get(record.problem.op).torch_serves(record.problem)


def beats_torch(record: Record, beaten: Record) -> bool:
    """Whether another family's record of the same size is known to be faster than what beat this one."""
    same = (record.key, record.device) == (beaten.key, beaten.device)
    return same and record.seconds < (record.torch_seconds or beaten.torch_seconds)


def _by_torch(record: Record, provenance: str, problem: Problem, skipped: int, reasons: list[str]) -> Choice:
    times = f"{record.torch_seconds * 1e3:.4g} ms against {record.seconds * 1e3:.4g} ms"
    _say_runners_up(reasons, problem, provenance, skipped)
    told = f"{record.family}: PyTorch was faster when tuned: {times} ({provenance} record {record.key})"
    return Choice(provenance, record=record, reasons=[told, *reasons])


def _say_runners_up(reasons: list[str], problem: Problem, provenance: str, skipped: int) -> None:
    """Why the better provenances were not to be had."""
    if skipped > _MAX_REASONS:
        reasons.append(f"{skipped - _MAX_REASONS} more records do not fit")
    missing = {
        "exact": f"exact: no usable record of {problem.key} on this device",
        "nearest": f"nearest: no usable record of {problem.static_key} on this device",
        "arch": f"arch: no usable record of {problem.static_key} on this architecture",
    }
    for name, text in missing.items():
        if name == provenance:
            break
        reasons.append(text)
