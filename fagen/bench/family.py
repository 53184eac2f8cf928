"""Ours held to one family (`--family`): what dispatch would pick were there no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fagen import families
from fagen.bench.peers import Cannot, Prepare, Serve
from fagen.bench.rows import Inputs, Row
from fagen.errors import FagenError
from fagen.families import Config, Family
from fagen.ops.attention.problem import Problem
from fagen.target import Target

if TYPE_CHECKING:
    import torch


def pick(problem: Problem, target: Target, name: str) -> tuple[Family, Config, str]:
    """The family, its best record that fits, else its default; and where that comes from."""
    from fagen.db.store import Database

    family = families.get(name)
    reason = family.supports(problem, target)
    if reason:
        raise Cannot(reason)
    for record, provenance in Database.load().candidates(problem, target):
        if record.family == name:
            try:
                config = family.config(record.config)
            except FagenError:  # of another version of the family
                continue
            if not family.rejects(problem, target, config):
                return family, config, provenance
    return family, family.require(problem, target, family.default(problem, target)), "default"


def ours(name: str, target: Target) -> Prepare:
    def prepare(row: Row, inputs: Inputs) -> Serve:
        from fagen.runtime import kernel
        from fagen.runtime.kernel import launcher
        from fagen.timing import timer

        family, config, _ = pick(row.problem, target, name)
        made = kernel.get(family, row.problem, target, config)
        calls: dict[int, timer.Call] = {}

        def serve(i: Inputs) -> torch.Tensor:
            calls.setdefault(id(i), launcher(made, i))()
            return i.outputs["out"]

        return serve

    return prepare


def choice(row: Row, target: Target, name: str) -> dict[str, Any]:
    """As the result keeps what dispatch picked."""
    from fagen.build import cache

    family, config, provenance = pick(row.problem, target, name)
    artifact = cache.lookup(family, row.problem, target, config)
    return {
        "key": row.problem.key, "family": family.name, "config": dict(config), "provenance": provenance,
        "record": None, "facts": artifact.facts if artifact else {}, "served_by": "kernel",
    }  # fmt: skip
