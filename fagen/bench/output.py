"""What `fagen bench` and `fagen ablation` share: the device, the command as it was typed, results that are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fagen.errors import UsageError


def save(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(result, indent=1, default=str) + "\n")
    os.replace(draft, path)


def read(path: Path, form: int, holds: str) -> dict[str, Any]:
    """A result that --out wrote: its format, and the list that it `holds`."""
    try:
        result = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"result {path} cannot be read", str(error).splitlines()[0]) from error
    if not isinstance(result, dict) or result.get("format") != form or not isinstance(result.get(holds), list):
        raise UsageError(f"result {path} is not of this format", f"it must be what --out writes, format {form}")
    return result
