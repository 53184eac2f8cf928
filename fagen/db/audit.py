"""What today's families and templates say about records: still what they were, of an older source, or of no use."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen import families
from fagen.codegen.spec import KernelSpec
from fagen.errors import DatabaseError, FagenError
from fagen.target import ARCHS, Target, host, known

if TYPE_CHECKING:
    from fagen.db.record import Record

KINDS = {
    "unreadable": "a file of which nothing can be used",
    "damaged": "a record that cannot be read",
    "illegal": "a record whose family, knobs or constraints are not today's",
    "duplicate": "a second record of the same problem and family, which hides the first",
    "misplaced": "a file whose place or name is not of its arch and device",
    "stale": "a record tuned with a kernel source that today's templates do not make",
}
HARMLESS = ("stale",)  # dispatch verifies such a kernel before its first use


@dataclass(frozen=True)
class Finding:
    path: Path
    kind: str
    text: str
    key: str = ""
    family: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "path": str(self.path)}


def target_of(record: Record) -> Target:
    """The machine of a record, as far as it is known here. Of another CPU the widest vectors are assumed."""
    if record.arch == "cpu":
        here = host()
        return here if here.device == record.device else dataclasses.replace(here, device=record.device, simd="avx512")
    units, likely = record.environment.get("units", ""), known(record.arch)
    told = re.fullmatch(r"[1-9][0-9]{0,5}", units) is not None
    return dataclasses.replace(likely, device=record.device, units=int(units) if told else likely.units)


def state(record: Record) -> tuple[str, str]:
    """("current", ""), or "stale" or "illegal" with the reason."""
    try:
        target, family = target_of(record), families.get(record.family)
        reason = family.supports(record.problem, target)
        if reason:
            return "illegal", f"{family.name}: {reason}"
        config = family.require(record.problem, target, family.config(record.config))
    except FagenError as error:
        return "illegal", error.what
    today = KernelSpec(family, record.problem, target, config).hash
    if today != record.source_hash:
        return "stale", f"its kernel source was {record.source_hash}, today it is {today}"
    return "current", ""


def check_file(path: Path) -> tuple[list[Record], list[Finding]]:
    """The records that can be read, and everything found."""
    from fagen.db import store

    try:
        file = store.open_file(path)
    except DatabaseError as error:
        return [], [Finding(path, "unreadable", " ".join(str(error).splitlines()))]
    records = file.records
    found = [Finding(path, "damaged", text.removeprefix(f"{path}: ")) for text in file.wrong]
    found += _misplaced(path, file.arch, file.device)
    keys = Counter((record.key, record.family) for record in records)
    for record in records:
        kind, text = state(record)
        if keys[record.key, record.family] > 1:
            keys[record.key, record.family] = 0  # told once
            found.append(Finding(path, "duplicate", "there is more than one", record.key, record.family))
        if kind != "current":
            found.append(Finding(path, kind, text, record.key, record.family))
    return records, found


def _misplaced(path: Path, arch: str, device: str) -> list[Finding]:
    from fagen.db import store

    right = store.path_of(path.parent.parent, arch, device)
    if right == path or path.parent.name not in ARCHS:  # a file by itself may have any name
        return []
    text = f"it is of {device} ({arch}): expected {right.parent.name}/{right.name}"
    return [Finding(path, "misplaced", text)]
