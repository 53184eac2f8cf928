"""Which kernel serves a problem: a recorded winner, else a family's default, else PyTorch. Never tunes, never lies."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fagen import env, families, trust
from fagen.errors import FagenError
from fagen.problem import Problem
from fagen.target import Target, gpu, host

if TYPE_CHECKING:
    import torch

    from fagen.db import Record
    from fagen.families import Config, Family
    from fagen.trust import Trust

PROVENANCES = {
    "exact": "tuned on this device for exactly this size",
    "nearest": "tuned on this device for the nearest size",
    "arch": "tuned on another device of this architecture",
    "default": "never tuned: the family's default",
    "built": "built already; it serves while the kernel of the choice is compiled",
    "none": "no kernel of ours",
}
_NOT_BUILT = {
    "wait": "not yet: the first call compiles it",
    "background": "not yet: the first call starts that, and does not wait",
    "never": "no, and FAGEN_BUILD=never forbids it: a call is an error",
}
_MOST_WRONG = 2  # winners of a changed source that one call verifies in vain
_MAX_REASONS = 4  # of records that were passed over; a database has thousands


@dataclass(frozen=True)
class Choice:
    """What serves a problem, and why each other choice does not."""

    kind: str  # "family" or "torch"
    provenance: str  # a key of PROVENANCES
    family: Family | None = None
    config: Config | None = None
    record: Record | None = None
    reasons: list[str] = field(default_factory=list)
    trust: Trust | None = None  # of the record: whether its source is still what was tuned

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "family": self.family.name if self.family else None,
            "config": dict(self.config) if self.config else None,
            "provenance": self.provenance,
            "record": self.record.key if self.record else None,
            "source": self.trust.state if self.trust else None,
            "reasons": self.reasons,
        }


def choose(problem: Problem, target: Target, *, check: bool = False, stale: str = "", ours: bool = False) -> Choice:
    """An exact record, the nearest, one of the same arch, the first able family's default, the next one's, PyTorch.

    PyTorch comes first where it was faster than the record's kernel when that was tuned, unless a kernel of `ours` is
    wanted in any case. `check` verifies a record whose kernel source has changed since it was tuned, if nobody has yet;
    that builds and runs it. `stale` stands for FAGEN_STALE.
    """
    from fagen.db import Database

    able, refusals = families.candidates(problem, target)
    reasons = [f"{name}: {reason}" for name, reason in refusals.items()]
    if not able:
        return Choice("torch", "none", reasons=reasons)
    skipped = wrong = 0
    beaten: tuple[Record, str] | None = None
    for record, provenance in Database.load().candidates(problem, target):
        if beaten and not beats_torch(record, beaten[0]):
            continue
        torch_first = not ours and not beaten and lost(record, provenance) and torch_serves(problem)
        choice, reason = by_record(
            record, provenance, problem, target, able, refusals, check=check and not torch_first, stale=stale
        )
        if torch_first and not reason:
            beaten = record, provenance
            continue
        if not reason:
            _say_runners_up(reasons, problem, provenance, skipped)
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
    """What a record makes of the problem, and why it may not serve, "" if it may. No size decides that."""
    family = next((f for f in able if f.name == record.family), None)
    if family is None:
        return Choice("torch", provenance, record=record), refusals.get(record.family, "no such family")
    config, reason = _legal(record, family, problem, target)
    if config is None:
        return Choice("torch", provenance, family, record=record), reason
    told = trust.judge(record, family, problem, target, config, check=check, stale=stale)
    return Choice("family", provenance, family, config, record, trust=told), "" if told.usable else told.text


def known_only() -> str:
    """For `stale`: a call that must not wait verifies nothing."""
    return trust.KNOWN if trust.mode() == "verify" else ""


def by_default(problem: Problem, target: Target, able: list[Family], reasons: list[str]) -> Choice:
    """The default of the first family whose default fits; `reasons` grow."""
    for family in able:
        try:
            config = family.require(problem, target, family.default(problem, target))
        except FagenError as error:
            reasons.append(f"{family.name}: its default does not fit: {error.what}")
            continue
        return Choice("family", "default", family, config, reasons=reasons)
    return Choice("torch", "none", reasons=reasons)


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
    from fagen import measure  # what it imports takes milliseconds

    slower = provenance != "arch" and measure.lost(record.seconds, record.spread, record.torch_seconds)
    return slower and torch_serves(record.problem)


def torch_serves(p: Problem) -> bool:
    """Whether SDPA computes this without a mask tensor: as `fallback` asks it. `Plan::find` in C++ asks the same."""
    return p.mask in ("none", *(["causal"] if p.seqlen_q == p.seqlen_k else [])) and not (p.softcap or p.alibi)


def beats_torch(record: Record, beaten: Record) -> bool:
    """Whether another family's record of the same size is known to be faster than what beat this one."""
    same = (record.key, record.device) == (beaten.key, beaten.device)
    return same and record.seconds < (record.torch_seconds or beaten.torch_seconds)


def _by_torch(record: Record, provenance: str, problem: Problem, skipped: int, reasons: list[str]) -> Choice:
    times = f"{record.torch_seconds * 1e3:.4g} ms against {record.seconds * 1e3:.4g} ms"
    _say_runners_up(reasons, problem, provenance, skipped)
    told = f"{record.family}: PyTorch was faster when tuned: {times} ({provenance} record {record.key})"
    return Choice("torch", provenance, record=record, reasons=[told, *reasons])


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


@functools.cache
def _gpu(index: int) -> Target | None:
    return gpu(index)


def target_of(device: torch.device) -> Target | None:
    """Where a tensor lives; None for devices that no family knows."""
    if device.type == "cpu":
        return host()
    if device.type != "cuda":
        return None
    import torch

    return _gpu(device.index if device.index is not None else torch.cuda.current_device())


# ---- explain ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What a call of `fagen.attention` would do. `str()` is for people."""

    problem: Problem | None
    target: Target | None
    choice: Choice
    built: bool | None  # None: not known, or nothing to build
    facts: dict[str, Any] = field(default_factory=dict)
    meanwhile: Choice | None = None  # what serves until it is built, where calls do not wait for that

    def to_dict(self) -> dict[str, Any]:
        return {
            "problem": self.problem.to_dict() if self.problem else None,
            "key": self.problem.key if self.problem else None,
            "target": {"arch": self.target.arch, "device": self.target.device} if self.target else None,
            **self.choice.to_dict(),
            "provenance_record": self.record_facts(),
            "built": self.built,
            "facts": self.facts,
            "meanwhile": self.meanwhile.to_dict() if self.meanwhile else None,
        }

    def record_facts(self) -> dict[str, Any] | None:
        """Where the winner comes from, how far its size is from the one that was asked, what was measured."""
        from fagen import db

        record, told = self.choice.record, self.choice.trust
        if record is None or self.problem is None or self.target is None:
            return None
        apart = db.differences(self.problem, record.problem, self.target.units)
        origin = db.Database.load().origin(record)
        here = db.environment(self.target)
        names = (
            "device",
            "seconds",
            "spread",
            "default_seconds",
            "torch_seconds",
            "speedup",
            "error",
            "trials",
            "date",
        )
        return {
            "key": record.key,
            "file": str(origin),
            "owner": db.owner(origin),
            **{name: getattr(record, name) for name in (*names, "environment")},
            "here": {n: here[n] for n, was in record.environment.items() if here.get(n, was) != was and n != "python"},
            "distance": sum(apart.values()),
            "apart": apart,
            "source": told.state if told else "",
            "source_text": told.text if told else "",
        }

    def _record_lines(self) -> list[str]:
        facts = self.record_facts()
        if facts is None:
            return []
        gain = f", {facts['speedup']:.2f}x the default" if facts["speedup"] else ""
        time = f"{facts['seconds'] * 1e3:.4g} ms ±{facts['spread'] * 1e3:.2g}{gain}"
        trials = f", best of {facts['trials']} candidates" if facts["trials"] else ""
        tools = ((n, facts["environment"].get(n, "")) for n in ("fagen", "torch", "nvcc", "cxx", "driver"))
        lines = [
            f"record   {facts['key']}: {time}, {facts['device']}, {facts['date']}{trials}",
            f"from     {facts['file']} ({facts['owner']})",
        ]
        named = ", ".join(f"{name} {_version(text)}" for name, text in tools if text)
        here = ", ".join(f"{name} {_version(text)}" for name, text in facts["here"].items())
        lines += [f"with     {named}" + (f" (here {here})" if here else "")] if named else []
        if facts["distance"]:
            parts = ", ".join(f"{name} {value:.2f}" for name, value in facts["apart"].items() if value)
            lines.append(f"apart    {facts['distance']:.2f} weighted doublings: {parts}")
        return [*lines, *([f"source   {facts['source']}: {facts['source_text']}"] if facts["source"] else [])]

    def __str__(self) -> str:
        choice = self.choice
        lines = [f"problem  {self.problem.key}"] if self.problem else []
        lines += [f"target   {self.target}"] if self.target else []
        if choice.kind == "torch":
            faster = f"{choice.provenance}: faster than our kernel when tuned" if choice.record else "fallback"
            lines.append(f"picked   PyTorch ({faster})")
        else:
            assert choice.family is not None
            lines.append(f"picked   {choice.family.name} ({choice.provenance}: {PROVENANCES[choice.provenance]})")
            lines.append(f"config   {choice.config}")
        lines += self._record_lines()
        if self.built is not None:
            lines.append(f"built    {'yes' if self.built else _NOT_BUILT[env.build_mode()]}")
        if self.meanwhile is not None:
            kernel = f"{self.meanwhile.family.name}: {self.meanwhile.config}" if self.meanwhile.family else "PyTorch"
            lines.append(f"until    {kernel} (FAGEN_BUILD=background)")
        lines += [f"not      {reason}" for reason in choice.reasons]
        return "\n".join(lines)


def _version(text: str) -> str:
    """13.0 of `Cuda compilation tools, release 13.0, V13.0.88 Build ...`, 12.2.0 of g++'s line."""
    found = re.findall(r"release ([\d.]+)", text) or re.findall(r"\d+(?:\.\d+)+(?:\+\w+)?", text)
    return found[-1] if found else text


def explain_problem(problem: Problem, target: Target, *, ours: bool = False) -> Report:
    """What serves the problem; nothing is compiled."""
    from fagen import build
    from fagen.db import Database

    waits = env.build_mode() != "background"
    choice = choose(problem, target, stale="" if waits else known_only(), ours=ours)
    choice.reasons.extend(f"database: {warning}" for warning in Database.load().warnings)
    if choice.kind == "torch":
        return Report(problem, target, choice, None)
    assert choice.family is not None and choice.config is not None
    try:
        artifact = build.lookup(choice.family, problem, target, choice.config)
    except FagenError as error:  # no compiler: then nothing is built either
        choice.reasons.append(f"{choice.family.name}: cannot be built here: {error.what}")
        return Report(problem, target, choice, False)
    meanwhile = None if waits or artifact is not None else _meanwhile(problem, target)
    return Report(problem, target, choice, artifact is not None, artifact.facts if artifact else {}, meanwhile)


def _meanwhile(problem: Problem, target: Target) -> Choice:
    from fagen import resolve

    found = resolve.stand_in(problem, target)
    if found is None:
        return Choice("torch", "none", reasons=["no kernel of the static key is built"])
    return Choice("family", "built", found.family, found.config)


def explain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Report:
    """What `fagen.attention` would do with the same arguments, and why each other choice was not taken."""
    from fagen import api

    call = api.describe(q, k, v, **options)
    if call.refusal:
        target = target_of(q.device)
        return Report(call.problem, target, Choice("torch", "none", reasons=[call.refusal]), None)
    assert call.problem is not None and call.target is not None
    return explain_problem(call.problem, call.target, ours=bool(options.get("return_lse")))
