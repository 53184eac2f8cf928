"""The kernels in generated/: rendered for people to read, each with a note of where it was last seen to be right.

    python -m fagen.cli.generated          render the folder anew from its kernels.toml
    python -m fagen.cli.generated verify   build, verify and time those this machine can run, and note that

A verification belongs to a source hash. A kernel whose source has changed since keeps its note and is marked stale.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

from fagen.cli.arguments import expand
from fagen.cli.commands.emit import choose
from fagen.codegen import emit
from fagen.codegen.spec import KernelSpec
from fagen.db.record import now
from fagen.errors import FagenError, MissingTool, UsageError, WrongResult
from fagen.notices import say
from fagen.target import Target, detect, host, known

ROOT = Path(__file__).parents[2] / "generated"
LIST, MANIFEST = "kernels.toml", "manifest.json"
_CPU = Target("cpu", "any", 8, simd="avx512")  # no machine in particular, so that the source is the same on all


def listed(root: Path = ROOT) -> dict[str, tuple[KernelSpec, str]]:
    """The kernels that kernels.toml asks for, by name, each with where its config comes from."""
    kernels = {}
    if not (root / LIST).is_file():
        raise MissingTool(
            "the generated kernels are of a checkout, and this fagen is installed without one",
            f"{root / LIST} is not there",
            "fagen emit writes a kernel as files anywhere",
        )
    for table in tomllib.loads((root / LIST).read_text())["kernel"]:
        name, arch = table.pop("name"), table.pop("arch")
        config, family = table.pop("config", "default"), table.pop("family", None)
        target = _CPU if arch == "cpu" else known(arch)
        problems = expand(table, target)
        if len(problems) != 1 or config == "best":
            raise UsageError(f"{LIST}: {name} is not one problem with a config of its own", str(table))
        kernels[name] = choose(problems[0], target, config, family)
    return kernels


def status(entry: dict[str, Any]) -> str:
    """What an entry may claim of itself."""
    verified = entry["verified"]
    if verified is None:
        return "unverified"
    return "verified" if verified["source_hash"] == entry["source_hash"] else "stale"


def read_manifest(root: Path = ROOT) -> dict[str, Any]:
    try:
        return json.loads((root / MANIFEST).read_text())["kernels"]
    except FileNotFoundError:
        return {}


def _write_manifest(root: Path, kernels: dict[str, Any]) -> None:
    for entry in kernels.values():
        entry["status"] = status(entry)
    (root / MANIFEST).write_text(json.dumps({"schema": 1, "kernels": dict(sorted(kernels.items()))}, indent=1) + "\n")


def write(root: Path = ROOT) -> list[str]:
    """Render all of them; the names of those whose source is not what it was."""
    kernels, old, entries = listed(root), read_manifest(root), {}
    for name in old.keys() - kernels.keys():  # no other folder is ours to remove
        shutil.rmtree(root / Path(name).name, ignore_errors=True)
    for name, (spec, provenance) in kernels.items():
        manifest = emit.write(spec, provenance, root / name, example=True)
        (root / name / emit.MANIFEST).unlink()  # there is one for all
        entries[name] = {
            key: manifest[key]
            for key in ("arch", "family", "problem", "config", "provenance", "source_hash", "build", "example")
        }
        entries[name]["verified"] = old.get(name, {}).get("verified")
    _write_manifest(root, entries)
    return [name for name in entries if old.get(name, {}).get("source_hash") != entries[name]["source_hash"]]


def record_verification(name: str, facts: dict[str, Any], root: Path = ROOT) -> None:
    """Note that the kernel with facts["source_hash"] was right: device, error, seconds, tflops, date."""
    entries = read_manifest(root)
    if name not in entries:
        raise UsageError(f"no generated kernel {name!r}", f"known: {', '.join(entries)}")
    if entries[name]["source_hash"] != facts["source_hash"]:
        raise WrongResult(f"{name} was verified at another source", f"{facts['source_hash']}", "run: make generated")
    entries[name]["verified"] = facts
    _write_manifest(root, entries)


# ---- on a device ----------------------------------------------------------------------------------------------------


def _left_out(spec: KernelSpec, target: Target) -> str:
    """Why this machine cannot run the kernel as it was rendered; empty if it can."""
    if target.arch != spec.target.arch:
        return f"it is for {spec.target.arch}"
    return ": ".join(spec.family.rejects(spec.problem, target, spec.config) or ())


def measure(spec: KernelSpec, target: Target) -> dict[str, Any]:
    """Build, verify and time one kernel on the device that is here."""
    from fagen.runtime import kernel
    from fagen.runtime.kernel import launcher
    from fagen.timing import timer
    from fagen.verify.checks import where

    ready = kernel.get(dataclasses.replace(spec, target=target))
    if ready.artifact.source_hash != spec.hash:
        raise WrongResult("the kernel is another one on this device", f"{ready.artifact.source_hash}, not {spec.hash}")
    inputs = ready.calls.inputs(spec.problem, where(target), 0, False)
    call = launcher(ready, inputs, inputs.outputs)
    call()
    verdict = ready.calls.check(inputs.call, inputs.outputs)
    if not verdict.ok:
        raise WrongResult(f"{spec.problem} is wrong on {target.device}", verdict.message)
    seconds = timer.time_calls({"it": call}, device=where(target))["it"].median
    return {
        "source_hash": spec.hash,
        "device": target.device,
        "error": verdict.error,
        "seconds": seconds,
        "tflops": spec.problem.flops() / seconds / 1e12,
        "date": now(),
    }


def verify_here(root: Path = ROOT) -> int:
    """Verify what this machine can run; the number of kernels that are wrong."""
    ran, wrong = 0, 0
    for name, (spec, _) in listed(root).items():
        target = detect() if spec.target.is_gpu else host()
        reason = _left_out(spec, target)
        if reason:
            say(f"{name}: left out, {reason}")
            continue
        ran += 1
        try:
            facts = measure(spec, target)
            record_verification(name, facts, root)
        except FagenError as error:
            wrong += 1
            say(f"{name}: {error}")
        else:
            speed = f"{facts['seconds'] * 1e3:.3f} ms, {facts['tflops']:.2f} TFLOP/s"
            say(f"{name}: right, error {facts['error']:.3g}, {speed}")
    if not ran:
        raise MissingTool(
            "no generated kernel is for this machine",
            ", ".join(sorted({spec.target.arch for spec, _ in listed(root).values()})),
        )
    return wrong


def main(words: list[str]) -> int:
    if words == ["verify"]:
        return 1 if verify_here() else 0
    if words:
        say(__doc__ or "")
        return 2
    for name in write():
        say(f"{name}: rendered anew")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except FagenError as error:
        say(str(error))
        sys.exit(error.exit_code)
