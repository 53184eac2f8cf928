"""A step on a problem: the family, the kernel's own problem, and the configs to choose from; or why there are none."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fagen import env, families
from fagen.ablation.spec import Ablation, Step
from fagen.codegen.spec import KernelSpec
from fagen.dispatch import choose
from fagen.errors import UsageError
from fagen.families import Family
from fagen.ops.attention.problem import Problem
from fagen.target import Target


@dataclass(frozen=True)
class StepPlan:
    """`problem` is what the kernel is asked; `reason` says why there is nothing to run."""

    step: str
    problem: Problem
    specs: tuple[KernelSpec, ...] = ()  # of one family; the fastest is taken
    reason: str = ""
    provenance: str = ""  # of a tuned step

    @property
    def key(self) -> tuple:
        """Steps with the same key are the same kernel on the same inputs."""
        return self.problem, frozenset(self.specs)


def plan(ablation: Ablation, problem: Problem, target: Target) -> list[StepPlan]:
    return [_plan(step, problem, target) for step in ablation.steps]


def _plan(step: Step, problem: Problem, target: Target) -> StepPlan:
    if step.tuned:
        return _tuned(step, problem, target)
    family = variant(families.get(step.family), step.variant)
    asked = problem
    if step.all_tiles and problem.mask == "causal":
        asked = problem.replace(mask="none", window_left=-1, window_right=-1)
    reason = family.supports(asked, target)
    if reason:
        return StepPlan(step.name, asked, reason=reason)
    size, reasons, legal = max(asked.head_dim_padded, asked.head_dim_v_padded), [], []
    limit = next((limit for limit in sorted(step.tiles) if size <= limit), None)
    if step.tiles and limit is None:
        return StepPlan(step.name, asked, reason=f"the ablation has no tiles for head dim {size}")
    base = {**family.default(asked, target), **step.config, **(step.causal if asked.mask != "none" else {})}
    for tile in step.tiles[limit] if limit else ({},):
        config = family.config({**base, **tile})
        broken = family.rejects(asked, target, config)
        reasons += [": ".join(broken)] if broken else []
        legal += [] if broken else [config]
    if not legal:
        return StepPlan(step.name, asked, reason=reasons[0])
    return StepPlan(
        step.name, asked, tuple(KernelSpec(family, asked, target, config) for config in dict.fromkeys(legal))
    )


def _tuned(step: Step, problem: Problem, target: Target) -> StepPlan:
    choice = choose.choose(problem, target, ours=True)
    if choice.spec is None:
        return StepPlan(step.name, problem, reason=next(iter(choice.reasons), "no family serves this"))
    return StepPlan(step.name, problem, (choice.spec,), provenance=choice.provenance)


def variant(family: Family, name: str) -> Family:
    """The same knobs on another template beside the family's own; dispatch and the tuner never see it."""
    if not name:
        return family
    own = Path(family.template)
    template = own.with_name(name + "".join(own.suffixes))
    if not (env.data_dir("templates") / template).is_file():
        raise UsageError(f"variant {name!r} of {family.name} is unknown", f"there is no template {template}")
    return dataclasses.replace(family, name=f"{family.name}-{name}", template=str(template))
