"""What an ablation says: its problems and its steps, read from TOML. docs/ablation.md describes the file.

A step's settings are those of the step before with what it changes; a step that names a family starts anew.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fagen.errors import UsageError
from fagen.families import get
from fagen.families.base import Value
from fagen.ops.attention import parse
from fagen.ops.attention.problem import DTYPES, Problem

MASKS = ("none", "causal")
SIZES = ("dtype", "head_dim", "mask", "seqlen", "tokens", "hidden")
_STEP = ("name", "says", "family", "variant", "all_tiles", "config", "causal", "tiles", "tuned")

Settings = dict[str, Value]


@dataclass(frozen=True)
class Step:
    """`config`, `causal` and `tiles` are complete; `states` is what the file says of the first two here."""

    name: str
    says: str
    family: str = ""  # of a tuned step: whatever dispatch picks
    variant: str = ""  # another template beside the family's own
    all_tiles: bool = False  # of a causal problem: full attention's kernel, which visits what the mask hides as well
    tuned: bool = False
    config: Settings = field(default_factory=dict, hash=False)
    causal: Settings = field(default_factory=dict, hash=False)  # over `config`, where there is a mask
    tiles: Mapping[int, tuple[Settings, ...]] = field(default_factory=dict, hash=False)  # to try, by largest head dim
    states: Mapping[str, Settings] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Ablation:
    name: str
    title: str
    sizes: Mapping[str, Any]
    steps: tuple[Step, ...]


def shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}


def load(word: str, *, gpu: bool) -> Ablation:
    """A shipped ablation by name, or a file; its part for GPUs or for CPUs."""
    path = shipped().get(word) or Path(word)
    if not path.is_file():
        known = ", ".join(shipped())
        raise UsageError(f"ablation {word!r} is unknown", f"known: {known}", "or name a TOML file: docs/ablation.md")
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"ablation {path} cannot be read", str(error).splitlines()[0]) from error
    kind = "gpu" if gpu else "cpu"
    part = document.get(kind)
    if not isinstance(part, dict) or not isinstance(part.get("step"), list) or not part["step"]:
        raise UsageError(f"ablation {path.stem} has no steps for a {kind.upper()}", f"it needs a table [[{kind}.step]]")
    sizes = {name: value for name, value in part.items() if name != "step"}
    _known(path.stem, sizes, SIZES)
    return Ablation(path.stem, str(document.get("title", path.stem)), sizes, _steps(path.stem, part["step"]))


def _known(where: str, table: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in table:
        if name not in names:
            raise UsageError(f"ablation {where}: unknown key {name!r}", f"known: {', '.join(names)}")


def _steps(ablation: str, tables: list[Any]) -> tuple[Step, ...]:
    found: list[Step] = []
    for number, table in enumerate(tables, 1):
        where = f"{ablation}, step {number}"
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            raise UsageError(f"ablation {where}: it has no name")
        _known(f"{where} ({table['name']})", table, _STEP)
        if any(table["name"] == step.name for step in found):
            raise UsageError(f"ablation {where}: its name {table['name']!r} is taken")
        found.append(_step(f"{where} ({table['name']})", table, found[-1] if found else None))
    return tuple(found)


def _step(where: str, table: Mapping[str, Any], before: Step | None) -> Step:
    name, says = table["name"], str(table.get("says", ""))
    if table.get("tuned"):
        return Step(name, says, tuned=True)
    family = table.get("family") or (before.family if before else "")
    if not family:
        raise UsageError(f"ablation {where}: it names no family", "the first step, and one after a tuned step, must")
    if before is None or "family" in table:
        before = Step("", "")
    config, causal = table.get("config", {}), table.get("causal", {})
    limits = table.get("tiles", {})
    if not all(map(parse.is_number, limits)):
        raise UsageError(
            f"ablation {where}: tiles of {', '.join(limits)}", "they stand under a head dim, like tiles.128"
        )
    tiles = {int(limit): tuple(entries) for limit, entries in limits.items()} or before.tiles
    for settings in (config, causal, *(entry for entries in tiles.values() for entry in entries)):
        _check(where, family, settings)
    masked = {knob: value for knob, value in before.causal.items() if knob not in config} | causal
    return Step(
        name, says, family, table.get("variant", ""), bool(table.get("all_tiles")), False,
        before.config | config, masked, tiles, {"config": config, "causal": causal},
    )  # fmt: skip


def _check(where: str, family: str, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        choices = get(family).knob(name).choices
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            raise UsageError(f"ablation {where}: {name}={value!r} is no choice of {family}", f"choices: {choices}")


# ---- problems -------------------------------------------------------------------------------------------------------


def problems(ablation: Ablation, given: Mapping[str, Any]) -> list[Problem]:
    """Every head dim, mask and length: tokens / length sequences of hidden / head dim heads."""
    missing = [name for name in SIZES if name not in ablation.sizes and name not in given]
    if missing:
        raise UsageError(
            f"ablation {ablation.name} does not say {missing[0]}", remedy=f"add --{missing[0].replace('_', '-')}"
        )
    sizes = {**ablation.sizes, **given}
    tokens, hidden = (_one(name, sizes[name]) for name in ("tokens", "hidden"))
    dtype = str(sizes["dtype"])
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown", f"known: {', '.join(DTYPES)}")
    masks = [word for value in _list(sizes["mask"]) for word in str(value).split(",")]
    for mask in masks:
        if mask not in MASKS:
            raise UsageError(f"mask {mask!r} is not studied", f"known: {', '.join(MASKS)}")
    dims, lengths = parse.head_dims(sizes["head_dim"]), parse.sizes(sizes["seqlen"])
    return [_problem(dtype, dim, mask, length, tokens, hidden) for dim in dims for mask in masks for length in lengths]


def _one(name: str, value: Any) -> int:
    found = parse.sizes(value)
    if len(found) != 1:
        raise UsageError(f"{name} {value!r} are {len(found)} sizes", "there is one for all problems")
    return found[0]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _problem(dtype: str, dim: tuple[int, int], mask: str, length: int, tokens: int, hidden: int) -> Problem:
    for what, whole, part in (("tokens", tokens, length), ("hidden", hidden, max(dim))):
        if whole < part:
            raise UsageError(f"{what} {whole} are less than {part}", "one sequence and one head are the least")
    batch, heads = tokens // length, hidden // max(dim)
    return Problem(
        dtype=dtype, head_dim=dim[0], head_dim_v=dim[1], mask=mask, batch=batch, heads=heads, seqlen_q=length,
        aligned=all(d * DTYPES[dtype] % 16 == 0 for d in dim),
    )  # fmt: skip


def series(problem: Problem) -> str:
    """What the problems of one table share: all but the length."""
    dims = (
        f"{problem.head_dim}" if problem.head_dim == problem.head_dim_v else f"{problem.head_dim}-{problem.head_dim_v}"
    )
    return f"d{dims} {'full' if problem.mask == 'none' else problem.mask}"
