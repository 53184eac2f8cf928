"""Ours held to one family (`--family`): what dispatch would pick were there no other."""

from __future__ import annotations

from typing import Any

from fagen import families
from fagen.bench.ours import launched
from fagen.bench.peers import Cannot, Prepare, Serve
from fagen.bench.rows import Inputs, Row
from fagen.codegen.spec import KernelSpec
from fagen.errors import FagenError
from fagen.ops.attention.problem import Problem
from fagen.target import Target


def pick(problem: Problem, target: Target, name: str) -> tuple[KernelSpec, str]:
    """The family's best record that fits, else its default; and where that comes from."""
    from fagen.db.store import Database
    from fagen.dispatch import choose

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
                confirmed = choose.confirmed(record, provenance, problem, target, [family])
                if confirmed is not None:
                    return confirmed, "confirmed"
                return KernelSpec(family, problem, target, config), provenance
    default = family.require(problem, target, family.default(problem, target))
    return KernelSpec(family, problem, target, default), "default"


def ours(name: str, target: Target) -> Prepare:
    def prepare(row: Row, inputs: Inputs) -> Serve:
        from fagen.runtime import kernel

        return launched(kernel.get(pick(row.problem, target, name)[0]))

    return prepare


def choice(row: Row, target: Target, name: str) -> dict[str, Any]:
    """As the result keeps what dispatch picked."""
    from fagen.build import cache

    spec, provenance = pick(row.problem, target, name)
    artifact = cache.lookup(spec)
    return {
        "key": row.problem.key, "family": spec.family.name, "config": dict(spec.config), "provenance": provenance,
        "record": None, "facts": artifact.facts if artifact else {}, "served_by": "kernel",
    }  # fmt: skip
