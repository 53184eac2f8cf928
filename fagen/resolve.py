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
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fagen import background, binding, build, db, dispatch, env, fallback, families, kernel, trust
from fagen.errors import FagenError, LaunchError
from fagen.plan import ASK, TORCH, Answer, Plan, Row
from fagen.problem import Problem
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.db import Record
    from fagen.dispatch import Choice
    from fagen.families import Config, Family
    from fagen.kernel import Kernel

_MOST_LOADED = 32  # kernels that the first call of a static key loads, of those that are built
_MOST_DEFAULTS = 4096  # answers by default that a plan keeps

_Key = tuple[str, str, Target, "Config"]  # family, static key, target, config: all that makes a kernel


_plans: dict[tuple[str, Target], Plan] = {}
_kernels: dict[_Key, Kernel] = {}  # loaded ones
_failed: set[_Key] = set()  # cannot be built; PyTorch computes instead
_passed_over: set[tuple[str, str, str, str]] = set()  # records that dispatch did not take for their own sizes
_epoch = object()  # another one when plans are dropped: a plan that was begun before is not kept after


def forget() -> None:
    """All that was chosen, so that every following call chooses anew."""
    for known in (_kernels, _failed, _passed_over):
        known.clear()
    renew()


def renew(static_key: str | None = None) -> None:
    """Make plans anew when they are next asked for, of what is loaded by then: those of a static key, or all."""
    global _epoch
    _epoch = object()  # before: a plan that is stored meanwhile is dropped, or not stored
    for key in list(_plans):
        if static_key in (None, key[0]):
            _plans.pop(key, None)
    binding.forget_table()


def _key(family: Family, problem: Problem, target: Target, config: Config) -> _Key:
    return family.name, problem.static_key, target, config


# ---- kernels --------------------------------------------------------------------------------------------------------


def built(family: Family, problem: Problem, target: Target, config: Config) -> Kernel:
    """Loaded, and compiled before that if need be, which is said. Rendered and read once a process."""
    key = _key(family, problem, target, config)
    found = _kernels.get(key)
    if found is None:
        job = build.job(family, problem, target, config)

        def tell() -> None:
            binding.say(f"compiling {job.name} (about {build.expected_seconds(family, target):.0f} s, once)")

        found = _kernels[key] = kernel.load(build.make(job, tell=tell), family, problem, config)
    return found


def loaded(family: Family, problem: Problem, target: Target, config: Config) -> Kernel | None:
    """Loaded, and from the cache before that; None where it is not built, or may not be read now."""
    key = _key(family, problem, target, config)
    if key not in _kernels and not _capturing(target):
        with contextlib.suppress(FagenError):  # no compiler here, or a library that does not load
            artifact = build.lookup(family, problem, target, config)
            if artifact is not None:
                _kernels[key] = kernel.load(artifact, family, problem, config)
                _prime(_kernels[key], target)
    return _kernels.get(key)


def _capturing(target: Target) -> bool:
    if not target.is_gpu:
        return False
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _prime(found: Kernel, target: Target) -> None:
    """Run it once on next to nothing: CUDA loads a kernel's code when it is first launched, in milliseconds."""
    if not target.is_gpu or not trust.device_is_ready(target):
        return
    import torch

    from fagen.problem import INTERVAL_KINDS, TORCH_DTYPES

    p, here = found.problem, torch.device("cuda", torch.cuda.current_device())
    dims = (p.head_dim, p.head_dim, p.head_dim_v, p.head_dim_v)
    columns, window = len(INTERVAL_KINDS.get(p.intervals, ())), {"causal": (-1, 0), "window": (0, 0)}
    with contextlib.suppress(RuntimeError), torch.no_grad():  # out of memory, say: then its first call loads it
        tensors = [torch.zeros(1, 1, 1, n, dtype=getattr(torch, TORCH_DTYPES[p.dtype]), device=here) for n in dims]
        found.launch(
            *tensors,
            intervals=torch.zeros(1, 1, 1, columns, dtype=torch.int32, device=here) if columns else None,
            alibi_slopes=torch.zeros(1, dtype=torch.float32, device=here) if p.alibi else None,
            window=window.get(p.mask, (-1, -1)), softcap=float(p.softcap), layout="bshd",
        )  # fmt: skip


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
    if _capturing(target):
        return _in_capture(problem, target)
    return _decide(problem, target, ours)


def plan_words(problem: Problem, target: Target, *, ours: bool = False) -> list[int]:
    """The plan of the problem's static key for the table; none before something was decided."""
    plan = _plans.get((problem.static_key, target))
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
        fallback.warn(f"no kernel of {problem.static_key} is loaded, and a CUDA graph is being captured")
    return Answer(False, found)


def _decide(problem: Problem, target: Target, ours: bool) -> Answer:
    """Choose, build or load, and make the plan of the static key anew."""
    background.warn_told()
    begun = _epoch
    waits = env.build_mode() != "background"
    choice = dispatch.choose(problem, target, check=waits, stale="" if waits else dispatch.known_only(), ours=ours)
    if choice.family is None or choice.config is None:
        if choice.record is None:  # else PyTorch was the faster one, which `explain` says
            fallback.warn("; ".join(choice.reasons) or "no family serves the problem")
        found = TORCH
    elif waits:
        found = _built_now(choice, problem, target)
    else:
        found = _built_meanwhile(choice, problem, target)
    _pass_over(problem, target, choice)
    plan = _make_plan(problem, target)
    if choice.record is not None and not plan.rows:
        plan.meanwhile = found
    if choice.provenance in ("default", "none") and len(plan.defaults) < _MOST_DEFAULTS:
        plan.defaults[plan.reads(problem)] = found
    _plans[problem.static_key, target] = plan
    if begun is not _epoch:  # a kernel has become ready since
        _plans.pop((problem.static_key, target), None)
    return found


def _built_now(choice: Choice, problem: Problem, target: Target) -> Answer:
    assert choice.family is not None and choice.config is not None
    try:
        return Answer(True, built(choice.family, problem, target, choice.config))
    except FagenError as error:
        if env.build_mode() == "never":
            raise
        _failed.add(_key(choice.family, problem, target, choice.config))
        fallback.warn(" ".join(str(error).splitlines()))
        return TORCH


def _built_meanwhile(choice: Choice, problem: Problem, target: Target) -> Answer:
    """The chosen kernel if it is built; else what serves until it is."""
    assert choice.family is not None and choice.config is not None
    family, config = choice.family, choice.config
    found = loaded(family, problem, target, config)
    if found is None:
        _build_meanwhile(family, problem, target, config)
        found = stand_in(problem, target)
    if found is None:
        reason = "cannot be built" if _key(family, problem, target, config) in _failed else "is being compiled"
        fallback.warn(f"the kernel of {problem.static_key} {reason}")
    return Answer(True, found)


def _build_meanwhile(family: Family, problem: Problem, target: Target, config: Config) -> None:
    key = _key(family, problem, target, config)

    def work() -> None:
        try:
            job = build.job(family, problem, target, config)
            _kernels[key] = kernel.load(build.make(job), family, problem, config)
        except FagenError as error:
            _failed.add(key)
            background.tell(" ".join(str(error).splitlines()))
        renew(problem.static_key)

    if key not in _failed and background.submit(key, work):
        binding.say(f"compiling a kernel of {problem.static_key} beside this process; another serves until it is built")


def stand_in(problem: Problem, target: Target) -> Kernel | None:
    """The nearest record whose kernel is built, else the default, else any kernel of the static key that is loaded."""
    for row in _rows(problem, target):
        if row.answer.kernel is not None:
            return row.answer.kernel
    choice = dispatch.by_default(problem, target, families.candidates(problem, target)[0], [])
    if choice.family is not None and choice.config is not None:
        found = loaded(choice.family, problem, target, choice.config)
        if found is not None:
            return found
    return _any_loaded(problem, target)


def _any_loaded(problem: Problem, target: Target) -> Kernel | None:
    """A kernel of the static key that this process has, of the nearest record if there is one."""
    plan = _plans.get((problem.static_key, target))
    nearest = plan.nearest(problem) if plan is not None else None
    if nearest is not None and nearest.answer.kernel is not None:
        return nearest.answer.kernel
    mine = (k for (_, static, where, _), k in list(_kernels.items()) if (static, where) == (problem.static_key, target))
    return next(mine, None)


# ---- plans ----------------------------------------------------------------------------------------------------------


def _make_plan(problem: Problem, target: Target) -> Plan:
    able, _ = families.candidates(problem, target)
    rows = sorted(_rows(problem, target), key=lambda row: (row.elsewhere, row.record.key, row.record.seconds))
    rows = [_where_torch_may(row, rows[index + 1 :]) for index, row in enumerate(rows)]
    old = _plans.get((problem.static_key, target))
    plan = Plan(problem, target, tuple(rows), tuple(able))
    if old is not None and old.families == plan.families:
        plan.defaults.update(old.defaults)
    return plan


def _where_torch_may(row: Row, behind: list[Row]) -> Row:
    """With what `dispatch.choose` takes in the place of a kernel that lost to PyTorch."""
    if not dispatch.lost(row.record, "arch" if row.elsewhere else "nearest"):
        return row
    better = next((r.answer for r in behind if dispatch.beats_torch(r.record, row.record)), TORCH)
    return dataclasses.replace(row, where_torch_may=better)


def _rows(problem: Problem, target: Target) -> Iterator[Row]:
    """The records of the static key that may serve, the nearest first. No kernel is built, no source verified."""
    able, refusals = families.candidates(problem, target)
    waits = env.build_mode() != "background"
    stale = "" if waits else dispatch.known_only()
    looked: set[_Key] = set()
    for record, provenance in db.Database.load().candidates(problem, target):
        if _name(record) in _passed_over:
            continue
        found = ASK
        if len(looked) < _MOST_LOADED:
            choice, reason = dispatch.by_record(record, provenance, problem, target, able, refusals, stale=stale)
            if reason:
                continue
            found = _answer_of(choice, problem, target)
            if choice.family is not None and choice.config is not None:
                key = _key(choice.family, problem, target, choice.config)
                looked.add(key)
                if not waits and (key in _failed or (not found.known and background.pending(key))):
                    continue  # another one serves, until it is built
        features = tuple(db.features(record.problem, target.units).values())
        yield Row(record, provenance == "arch", features, found)


def _answer_of(choice: Choice, problem: Problem, target: Target) -> Answer:
    """What a usable record's kernel is, if it is built; no size counts."""
    if choice.family is None or choice.config is None:
        return TORCH
    if choice.trust is not None and choice.trust.state == "unverified":
        return ASK
    if _key(choice.family, problem, target, choice.config) in _failed:
        return TORCH
    found = loaded(choice.family, problem, target, choice.config)
    return Answer(found is not None, found)


def _name(record: Record) -> tuple[str, str, str, str]:
    return record.arch, record.device, record.key, record.family


def _pass_over(problem: Problem, target: Target, choice: Choice) -> None:
    """Records nearer than the chosen one will not serve either when another size comes: their reasons know no size."""
    for record, provenance in db.Database.load().candidates(problem, target):
        if record == choice.record:
            break
        if not dispatch.lost(record, provenance):  # of those one may serve the sizes that PyTorch cannot
            _passed_over.add(_name(record))
