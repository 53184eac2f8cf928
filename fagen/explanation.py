"""`fagen.explain`: what a call would do, from which record, and why nothing else serves it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fagen import env, ops
from fagen.dispatch.choose import PROVENANCES, Choice, choose, known_only
from fagen.errors import FagenError
from fagen.ops.attention.backward_problem import BackwardProblem
from fagen.ops.attention.problem import Problem
from fagen.target import Target

if TYPE_CHECKING:
    import torch


_NOT_BUILT = {
    "wait": "not yet: the first call compiles it",
    "background": "not yet: the first call starts that, and does not wait",
    "never": "no, and FAGEN_BUILD=never forbids it: a call is an error",
}


# ---- explain ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What a call of `fagen.attention` would do. `str()` is for people."""

    problem: Problem | None
    target: Target | None
    choice: Choice
    built: bool | None  # None: not known, or nothing to build
    facts: dict[str, Any] = field(default_factory=dict)
    meanwhile: Choice | None = None  # what serves until it is built, where calls do not wait for that
    gradients: Explanation | None = None  # what computes them, where the call is differentiated

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
            "gradients": self.gradients.to_dict() if self.gradients else None,
        }

    def record_facts(self) -> dict[str, Any] | None:
        """Where the winner comes from, how far its size is from the one that was asked, what was measured."""
        from fagen.db import store
        from fagen.db.record import environment

        record, told = self.choice.record, self.choice.trust
        if record is None or self.problem is None or self.target is None:
            return None
        apart = ops.get(self.problem.op).differences(self.problem, record.problem, self.target.units)
        origin = store.Database.load().origin(record)
        here = environment(self.target)
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
            "owner": store.owner(origin),
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
            assert choice.spec is not None
            lines.append(f"picked   {choice.spec.family.name} ({choice.provenance}: {PROVENANCES[choice.provenance]})")
            lines.append(f"config   {choice.config}")
        lines += self._record_lines()
        if self.built is not None:
            lines.append(f"built    {'yes' if self.built else _NOT_BUILT[env.build_mode()]}")
        if self.meanwhile is not None:
            spec = self.meanwhile.spec
            kernel = f"{spec.family.name}: {spec.config}" if spec else "PyTorch"
            lines.append(f"until    {kernel} (FAGEN_BUILD=background)")
        lines += [f"not      {reason}" for reason in choice.reasons]
        lines += ["", str(self.gradients)] if self.gradients else []
        return "\n".join(lines)


def _version(text: str) -> str:
    """13.0 of `Cuda compilation tools, release 13.0, V13.0.88 Build ...`, 12.2.0 of g++'s line."""
    found = re.findall(r"release ([\d.]+)", text) or re.findall(r"\d+(?:\.\d+)+(?:\+\w+)?", text)
    return found[-1] if found else text


def explain_problem(problem: Problem, target: Target, *, ours: bool = False) -> Explanation:
    """What serves the problem; nothing is compiled."""
    from fagen.build import cache
    from fagen.db.store import Database

    waits = env.build_mode() != "background"
    choice = choose(problem, target, stale="" if waits else known_only(), ours=ours)
    choice.reasons.extend(f"database: {warning}" for warning in Database.load().warnings)
    if choice.spec is None:
        return Explanation(problem, target, choice, None)
    try:
        artifact = cache.lookup(choice.spec)
    except FagenError as error:  # no compiler: then nothing is built either
        choice.reasons.append(f"{choice.spec.family.name}: cannot be built here: {error.what}")
        return Explanation(problem, target, choice, False)
    meanwhile = None if waits or artifact is not None else _meanwhile(problem, target)
    return Explanation(problem, target, choice, artifact is not None, artifact.facts if artifact else {}, meanwhile)


def _meanwhile(problem: Problem, target: Target) -> Choice:
    from fagen.dispatch import resolve

    found = resolve.stand_in(problem, target)
    if found is None:
        return Choice("none", reasons=["no kernel of the static key is built"])
    return Choice("built", found.spec)


def explain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Explanation:
    """What `fagen.attention` would do with the same arguments, and why each other choice was not taken.

    Where it would be differentiated (q, k or v requires a gradient), the same for its gradients.
    """
    from fagen.ops.attention import derivatives
    from fagen.ops.attention.call import AttentionCall

    call = AttentionCall.of(q, k, v, **options).without_sinks()
    if call.refusal:
        return Explanation(None, call.target, Choice("none", reasons=[call.refusal]), None)
    assert call.target is not None
    if not derivatives.differentiated(call.q, call.k, call.v):
        return explain_problem(call.problem, call.target, ours=call.want_lse)
    backward = BackwardProblem.of(call.problem, deterministic=derivatives.must_repeat(call.deterministic))
    gradients = explain_problem(backward, call.target)
    if gradients.choice.spec is None:
        reason = "PyTorch computes the gradients, and the output with them"
        return Explanation(call.problem, call.target, Choice("none", reasons=[reason]), None, gradients=gradients)
    forward = explain_problem(call.problem, call.target, ours=True)  # the gradients need the LSE
    return dataclasses.replace(forward, gradients=gradients)
