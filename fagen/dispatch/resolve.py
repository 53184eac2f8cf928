"""From a problem to a loaded kernel, and the plan of its static key: which record serves which size.

A plan (`plan.py`) is made once a static key and device; the C++ table is given it, too. What a row of it lacks (a
kernel that is not built, a changed source that is not verified) is done when a size asks for it, and the plan is made
anew.

FAGEN_BUILD says what a call does whose kernel is not built. With `background` it is served by the nearest record whose
kernel is built, else by any kernel of the static key that is loaded, else by PyTorch, while the kernel is compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fagen import env, families, ops
from fagen.build import cache
from fagen.codegen.spec import KernelSpec, Key
from fagen.db import store
from fagen.dispatch import choose, kernels
from fagen.dispatch.plan import ASK, TORCH, Answer, Plan, PlannedRecord
from fagen.errors import FagenError, LaunchError
from fagen.notices import notify, warn_fallback
from fagen.ops.base import Problem
from fagen.runtime import background, binding, kernel
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.db.record import Record
    from fagen.dispatch.choose import Choice
    from fagen.runtime.kernel import Kernel


_MOST_LOADED = 32  # kernels that the first call of a static key loads, of those that are built
_MOST_DEFAULTS = 4096  # answers by default that a plan keeps

_plans: dict[tuple[str, Target], Plan] = {}
_passed_over: set[tuple[str, str, str, str]] = set()  # records that dispatch did not take for their own sizes
_epoch = object()  # another one when plans are dropped: a plan that was begun before is not kept after


def forget() -> None:
    """All that was chosen, so that every following call chooses anew."""
    kernels.forget()
    _passed_over.clear()
    renew()


def epoch() -> object:
    """Another object each time that what was chosen may no longer hold."""
    return _epoch


def renew(static_key: str | None = None) -> None:
    """Make plans anew when they are next asked for, of what is loaded by then: those of a static key, or all."""
    global _epoch
    _epoch = object()  # before: a plan that is stored meanwhile is dropped, or not stored
    for key in list(_plans):
        if static_key in (None, key[0]):
            _plans.pop(key, None)
    binding.forget_table()


# ---- a problem's kernel ---------------------------------------------------------------------------------------------


def kernel_for(problem: Problem, target: Target, *, ours: bool = False) -> Kernel | None:
    """What serves the problem now, compiled before if calls wait; None where PyTorch computes, with a warning unless it
    is faster.

    `ours`: a kernel all the same where PyTorch is faster, as for the LSE, which it does not give.
    """
    return answer(problem, target, ours=ours).kernel


def answer(problem: Problem, target: Target, *, ours: bool = False) -> Answer:
    """The same; `known` is False where it holds for this call alone."""
    plan = _plans.get((problem.static_key, target))
    found = plan.find(problem, ours) if plan is not None else ASK
    if found.known:
        return found
    if kernels.capturing(target):
        return _in_capture(problem, target)
    return _decide(problem, target, ours)


def build_together(problem: Problem, alongside: Problem, target: Target) -> None:
    """Begin or do at once the compilations of a problem's kernel and of one that is needed with it, of `ours`.

    None where PyTorch serves the problem: then it does all. The answers to both say what went wrong.
    """
    mode = env.build_mode()
    if mode == "never" or kernels.capturing(target):
        return
    stale = choose.known_only() if mode == "background" else ""
    first = choose.choose(problem, target, stale=stale).spec
    second = choose.choose(alongside, target, stale=stale, ours=True).spec if first is not None else None
    if first is None or second is None:
        return
    if mode == "wait":
        kernels.build_together((first, second))
    elif kernels.loaded(second) is None:
        _build_meanwhile(second)


def build_ahead(problem: Problem, target: Target) -> None:
    """Begin to compile what a graph that is traced will ask for, beside this thread. Nothing is loaded here: a tracer
    looks on."""
    mode = env.build_mode()
    if mode == "never":
        return
    stale = choose.known_only() if mode == "background" else ""
    spec = choose.choose(problem, target, stale=stale, ours=True).spec
    if spec is None or spec.key in kernels.in_memory or spec.key in kernels.failed:
        return
    if mode == "background":
        _build_meanwhile(spec)
    else:
        background.submit(spec.key, functools.partial(_build_for_later, spec))


def _build_for_later(spec: KernelSpec) -> None:
    """Whoever then asks for one that cannot be built learns why."""
    with contextlib.suppress(FagenError):
        kernels.built(spec)


def plan_of(problem: Problem, target: Target) -> Plan | None:
    """The plan of the problem's static key; none before something was decided, or where it is to be made anew."""
    return _plans.get((problem.static_key, target))


def plan_words(problem: Problem, target: Target, *, ours: bool = False) -> list[int]:
    """The plan of the problem's static key for the table; none before something was decided."""
    plan = plan_of(problem, target)
    return plan.words(ours) if plan is not None else []


def _in_capture(problem: Problem, target: Target) -> Answer:
    """Nothing is compiled or loaded; where calls do not wait for kernels, one that is loaded serves."""
    if env.build_mode() != "background":
        raise LaunchError(
            f"a CUDA graph capture met a kernel that is not loaded: {problem}",
            "nothing is compiled or loaded during a capture",
            "make the same call once before capturing (compile ahead of that with: fagen build)",
        )
    found = _any_loaded(problem, target)
    if found is None:
        warn_fallback(f"no kernel of {problem.static_key} is loaded, and a CUDA graph is being captured")
    return Answer(False, found)


def _decide(problem: Problem, target: Target, ours: bool) -> Answer:
    """Choose, build or load, and make the plan of the static key anew."""
    background.warn_told()
    begun = _epoch
    waits = env.build_mode() != "background"
    choice = choose.choose(problem, target, check=waits, stale="" if waits else choose.known_only(), ours=ours)
    if choice.spec is None:
        if choice.record is None:  # else PyTorch was the faster one, which `explain` says
            warn_fallback("; ".join(choice.reasons) or "no family serves the problem")
        found = TORCH
    elif waits:
        found = _built_now(choice.spec)
    else:
        found = _built_meanwhile(choice.spec)
    _pass_over(problem, target, choice)
    plan = _make_plan(problem, target)
    if choice.record is not None and not plan.rows:
        plan.meanwhile = found
    if len(plan.defaults) < _MOST_DEFAULTS:
        _note_default(plan, problem, choice, found)
    _plans[problem.static_key, target] = plan
    if begun is not _epoch:  # a kernel has become ready since
        _plans.pop((problem.static_key, target), None)
    return found


def _built_now(spec: KernelSpec) -> Answer:
    try:
        return Answer(True, kernels.built(spec))
    except FagenError as error:
        if env.build_mode() == "never":
            raise
        kernels.failed.add(spec.key)
        warn_fallback(" ".join(str(error).splitlines()))
        return TORCH


def _built_meanwhile(spec: KernelSpec) -> Answer:
    """The chosen kernel if it is built; else what serves until it is."""
    found = kernels.loaded(spec)
    if found is None:
        _build_meanwhile(spec)
        found = stand_in(spec.problem, spec.target)
    if found is None:
        reason = "cannot be built" if spec.key in kernels.failed else "is being compiled"
        warn_fallback(f"the kernel of {spec.problem.static_key} {reason}")
    return Answer(True, found)


def _build_meanwhile(spec: KernelSpec) -> None:
    static_key = spec.problem.static_key

    def work() -> None:
        try:
            kernels.in_memory[spec.key] = kernel.load(cache.build(spec), spec)
        except FagenError as error:
            kernels.failed.add(spec.key)
            background.tell(" ".join(str(error).splitlines()))
        renew(static_key)

    if spec.key not in kernels.failed and background.submit(spec.key, work):
        notify(f"compiling a kernel of {static_key} beside this process; another serves until it is built")


def stand_in(problem: Problem, target: Target) -> Kernel | None:
    """The nearest record whose kernel is built, else the default, else any kernel of the static key that is loaded."""
    for row in _rows(problem, target):
        if row.answer.kernel is not None:
            return row.answer.kernel
    choice = choose.by_default(problem, target, families.serving(problem, target)[0], [])
    if choice.spec is not None:
        found = kernels.loaded(choice.spec)
        if found is not None:
            return found
    return _any_loaded(problem, target)


def _any_loaded(problem: Problem, target: Target) -> Kernel | None:
    """A kernel of the static key that this process has, of the nearest record if there is one."""
    plan = _plans.get((problem.static_key, target))
    nearest = plan.nearest(problem) if plan is not None else None
    if nearest is not None and nearest.answer.kernel is not None:
        return nearest.answer.kernel
    mine = (
        k
        for (_, static, where, _), k in list(kernels.in_memory.items())
        if (static, where) == (problem.static_key, target)
    )
    return next(mine, None)


# ---- plans ----------------------------------------------------------------------------------------------------------


def _make_plan(problem: Problem, target: Target) -> Plan:
    able, _ = families.serving(problem, target)
    rows = sorted(_rows(problem, target), key=lambda row: (row.elsewhere, row.record.key, row.record.seconds))
    rows = [_where_torch_may(row, rows[index + 1 :]) for index, row in enumerate(rows)]
    old = _plans.get((problem.static_key, target))
    plan = Plan(problem, target, tuple(rows), tuple(able))
    if old is not None and old.families == plan.families:
        plan.defaults.update(old.defaults)
    for row in rows:
        if row.confirms and row.answer.known:
            plan.defaults.setdefault(plan.reads(row.record.problem, row.confirms), row.answer)
    return plan


def _note_default(plan: Plan, problem: Problem, choice: Choice, found: Answer) -> None:
    """What serves all sizes that defaults cannot tell from this one."""
    if choice.provenance in ("default", "none"):
        plan.defaults[plan.reads(problem)] = found
    row = next((row for row in plan.rows if row.record == choice.record), None)
    if row is None or not row.confirms or choice.spec is None:
        return
    if choice.config == choose.default_of(choice.spec.family, problem, plan.target):
        plan.defaults[plan.reads(problem, row.confirms)] = found


def _where_torch_may(row: PlannedRecord, behind: list[PlannedRecord]) -> PlannedRecord:
    """With what `dispatch.choose` takes in the place of a kernel that lost to PyTorch."""
    if not choose.lost(row.record, "arch" if row.elsewhere else "nearest"):
        return row
    better = next((r for r in behind if choose.beats_torch(r.record, row.record)), None)
    if better is None:
        return dataclasses.replace(row, where_torch_may=TORCH)
    return dataclasses.replace(row, where_torch_may=better.answer, may_confirm=better.confirms)


def _rows(problem: Problem, target: Target) -> Iterator[PlannedRecord]:
    """The records of the static key that may serve, the nearest first. No kernel is built, no source verified."""
    able, refusals = families.serving(problem, target)
    waits = env.build_mode() != "background"
    stale = "" if waits else choose.known_only()
    looked: set[Key] = set()
    op = ops.get(problem.op)
    for record, provenance in store.Database.load().candidates(problem, target, every_regime=True):
        if _name(record) in _passed_over:
            continue
        found = ASK
        if len(looked) < _MOST_LOADED:
            choice, reason = choose.by_record(record, provenance, problem, target, able, refusals, stale=stale)
            if reason:
                continue
            found = _answer_of(choice)
            if choice.spec is not None:
                key = choice.spec.key
                looked.add(key)
                if not waits and (key in kernels.failed or (not found.known and background.pending(key))):
                    continue  # another one serves, until it is built
        features = tuple(op.features(record.problem, target.units).values())
        regime = op.regime(record.problem, target)
        confirms = any(f.name == record.family and choose.confirms(record, f, target) for f in able)
        name = record.family if confirms else ""
        yield PlannedRecord(record, provenance == "arch", features, regime, found, confirms=name)


def _answer_of(choice: Choice) -> Answer:
    """What a usable record's kernel is, if it is built; no size counts."""
    if choice.spec is None:
        return TORCH
    if choice.trust is not None and choice.trust.state == "unverified":
        return ASK
    if choice.spec.key in kernels.failed:
        return TORCH
    found = kernels.loaded(choice.spec)
    return Answer(found is not None, found)


def _name(record: Record) -> tuple[str, str, str, str]:
    return record.arch, record.device, record.key, record.family


def _pass_over(problem: Problem, target: Target, choice: Choice) -> None:
    """Records nearer than the chosen one will not serve either when another size comes: their reasons know no size."""
    for record, provenance in store.Database.load().candidates(problem, target):
        if record == choice.record:
            break
        if not choose.lost(record, provenance):  # of those one may serve the sizes that PyTorch cannot
            _passed_over.add(_name(record))
