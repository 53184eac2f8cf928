"""Whether a change of a template is faster: kernels of several checkouts, timed in turn on the rows of the bench.

    python benchmarks/variants.py render before CASES --target sm_90 --out variants.json    # in one checkout
    python benchmarks/variants.py render after CASES --target sm_90 --out variants.json     # in another
    python benchmarks/variants.py time variants.json --peers cudnn,fa3 --fa3 PATH --out timed.json

`render` needs no GPU. It adds the sources that its checkout renders for each case to the file. A case is a line, a row
of the suites by the beginning of its name and knobs that differ from the family's default at that row:

    d128 causal s8192: tile_m=192 tile_n=80 stages=3
    backward d128 causal s8192: ds_stages=2

A case with a knob, or a value, that the checkout does not have is left out there. `time` builds all of it, lets each
kernel answer once on each of its rows, and times those that were right against each other and the peers in one
interleaved run a row. A kernel that hangs or crashes costs its process, and is told; the others go on, but for those
of a label that has done so twice. What renders to the same source on a row is one kernel, under the first label.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from multiprocessing import connection
from pathlib import Path
from typing import Any

from fagen import families, target
from fagen.bench import ours, peers, rows, run, suites
from fagen.bench.prebuild import together
from fagen.build import cache, toolchain
from fagen.build.compilers import compile_workers
from fagen.build.job import Artifact, Job, make_job
from fagen.codegen import render
from fagen.codegen.spec import KernelSpec
from fagen.errors import FagenError, UsageError
from fagen.families import Config, Family
from fagen.runtime import kernel
from fagen.target import Target
from fagen.tuner.workers import Death, Worker

ANSWER_SECONDS = 30.0  # for a kernel's first call, inputs and verification
RACE_SECONDS = 300.0
MOST_DEATHS = 2  # of a label


def all_rows(where: Target) -> dict[str, rows.Row]:
    names = ("peers", "masks", "models", "small", "odd-d", "large-d", "random") if where.is_gpu else ("small",)
    forward = [row for name in names for row in suites.suite(name, where, 1)]
    backward = [rows.row_of_op(row, "backward", same_bits=same) for row in forward for same in (False, True)]
    named_by_op = [dataclasses.replace(row, name=f"backward {row.name}") for row in backward]
    decode = [row for name in ("decode", "paged", "mla", "mixed") for row in suites.suite(name, where, op="decode")]
    of_fp8 = suites.suite("fp8", where) if where.is_gpu else []
    return {row.name: row for row in (*forward, *named_by_op, *decode, *of_fp8)}


# ---- render ---------------------------------------------------------------------------------------------------------


def case(
    line: str, table: dict[str, rows.Row], where: Target, only: str | None
) -> tuple[rows.Row, Family, Config] | str:
    """A row, a family and a config; or why this checkout has none."""
    beginning, _, words = line.partition(":")
    row = next((row for name, row in table.items() if name.startswith(beginning.strip())), None)
    if row is None:
        raise UsageError(f"no row begins with {beginning.strip()!r}", remedy=", ".join(table))
    able, _ = families.candidates(row.problem, where)
    family = families.get(only) if only else able[0]
    values = dict(family.default(row.problem, where))
    for word in words.split():
        name, _, value = word.partition("=")
        choices = {str(c).lower(): c for knob in family.knobs if knob.name == name for c in knob.choices}
        if value.lower() not in choices:
            return f"{word} is no choice here"
        values[name] = choices[value.lower()]
    config = family.config(values)
    broken = family.rejects(row.problem, where, config)
    return f"{broken[0]}: {broken[1]}" if broken else (row, family, config)


def render_all(label: str, cases: Path, where: Target, only: str | None, out: Path) -> int:
    table, count = all_rows(where), 0
    known = json.loads(out.read_text()) if out.exists() else []
    for line in filter(None, map(str.strip, cases.read_text().splitlines())):
        if line.startswith("#"):
            continue
        found = case(line, table, where, only)
        if isinstance(found, str):
            print(f"left out: {line} ({found})")
            continue
        row, family, config = found
        source = KernelSpec(family, row.problem, where, config).source
        known.append({"label": label, "row": row.name, "family": family.name, "config": dict(config), "source": source})
        count += 1
    out.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{label}: {count} kernels")
    return 0


# ---- time, in a process that may be lost ----------------------------------------------------------------------------


def built(variant: dict[str, Any], row: rows.Row, where: Target) -> Artifact:
    """The variant's own source, with the flags that its family has here."""
    family = families.get(variant["family"])
    job = make_job(KernelSpec(family, row.problem, where, family.default(row.problem, where)))
    about = {"family": family.name, "source_hash": render.source_hash(variant["source"])}
    job = Job(job.name, variant["source"], job.suffix, job.flags, job.link_flags, job.arch, about=about)
    return cache.make(job)


def participant(variant: dict[str, Any], artifact: Artifact, where: Target) -> peers.Prepare:
    def prepare(row: rows.Row, inputs: rows.Inputs) -> peers.Serve:
        spec = KernelSpec(families.get(variant["family"]), row.problem, where, Config(variant["config"]))
        return ours.launched(kernel.load(artifact, spec))

    return prepare


def race(request: dict[str, Any]) -> dict[str, Any]:
    """A row's participants, verified and, if `timed`, timed in turn with the peers: the worker's job."""
    import torch

    where, row = request["target"], all_rows(request["target"])[request["row"]]
    entrants = {name: participant(*entry, where) for name, entry in request["entries"].items()}
    if not request["timed"]:
        device = "cuda" if where.is_gpu else "cpu"
        inputs = rows.make_inputs(row, where, 0)
        return {name: run.prepared(prepare, row, inputs, device, name)[0] for name, prepare in entrants.items()}
    loaded, absent = peers.load(request["peers"], "cuda" if where.is_gpu else "cpu", request["paths"], row.op)
    others = {name: peer.prepare for name, peer in loaded.items()}
    with torch.no_grad():
        found = run.time_row(row, entrants | others, where, request["settings"])
    return {**found["participants"], **{name: {"outcome": "absent", "reason": why} for name, why in absent.items()}}


def ask(worker: Worker, request: dict[str, Any], seconds: float) -> Any:
    worker.send(request, seconds)
    while (reply := worker.poll()) is None:
        connection.wait(worker.waits_on, timeout=0.2)
    return reply


def distinct(variants: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each kernel of a row once; which labels share one is told."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for variant in variants:
        same = first.setdefault((variant["row"], variant["source"]), variant)
        if same is not variant:
            shared.setdefault((same["label"], variant["label"]), []).append(variant["row"])
    for (one, other), where in shared.items():
        print(f"{other} is {one}: {', '.join(where)}")
    return list(first.values())


def time_all(variants: list[dict[str, Any]], where: Target, args: argparse.Namespace) -> dict[str, Any]:
    table, variants = all_rows(where), distinct(variants)
    deaths: Counter[str] = Counter()
    artifacts: dict[int, Artifact] = {}
    result: dict[str, Any] = {"device": where.device, "rows": {}}

    def make(number: int) -> None:
        try:
            artifacts[number] = built(variants[number], table[variants[number]["row"]], where)
        except FagenError as error:
            print(f"not built: {variants[number]['label']}, {variants[number]['row']}: {str(error).splitlines()[-1]}")

    together(make, range(len(variants)), compile_workers(where.is_gpu, measuring=True))
    print(f"{len(artifacts)} of {len(variants)} kernels built", flush=True)
    worker = Worker(race, args.out.with_suffix(".log"))
    try:
        for name in dict.fromkeys(variant["row"] for variant in variants):
            here = [n for n, variant in enumerate(variants) if variant["row"] == name and n in artifacts]
            mine = {
                label: (variants[n], artifacts[n])
                for label, n in zip(named([variants[n] for n in here]), here, strict=True)
            }
            request = {
                "target": where,
                "row": name,
                "peers": args.peers,
                "paths": args.paths,
                "settings": args.settings,
            }
            facts = {}
            for label, entry in mine.items():
                if deaths[entry[0]["label"]] >= MOST_DEATHS:
                    facts[label] = {"outcome": "left out", "reason": f"{MOST_DEATHS} before it crashed"}
                    continue
                reply = ask(worker, request | {"entries": {label: entry}, "timed": False}, ANSWER_SECONDS)
                facts[label] = told(reply, label)
                if not isinstance(reply, dict):  # what it left behind may not be trusted
                    worker.kill()
                    deaths[entry[0]["label"]] += 1
            right = {label: entry for label, entry in mine.items() if facts[label]["outcome"] == "ok"}
            reply = ask(worker, request | {"entries": right, "timed": True}, RACE_SECONDS)
            facts |= reply if isinstance(reply, dict) else {"all": told(reply, "all")}
            result["rows"][name] = facts
            print(shown(name, facts, args.base), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        worker.kill()
    return result


def told(reply: Any, label: str) -> dict[str, Any]:
    """A worker's answer for one participant, or what became of it."""
    if isinstance(reply, dict):
        return reply[label]
    return {"outcome": "crash", "reason": reply.reason if isinstance(reply, Death) else repr(reply)}


def named(variants: list[dict[str, Any]]) -> list[str]:
    """The label of each kernel of a row, and the knobs that tell them apart."""
    knobs = dict.fromkeys(knob for v in variants for knob in v["config"])
    apart = [knob for knob in knobs if len({repr(v["config"].get(knob)) for v in variants}) > 1]
    return [
        " ".join([v["label"], *(f"{knob}={v['config'][knob]}" for knob in apart if knob in v["config"])])
        for v in variants
    ]


def shown(name: str, facts: dict[str, Any], base: str | None) -> str:
    """A row's table: times, and speed against the base and the best peer."""
    timed = {label: f for label, f in facts.items() if "seconds" in f}
    first = min((f["seconds"] for label, f in timed.items() if base and label.split()[0] == base), default=None)
    rivals = [f["seconds"] for label, f in timed.items() if label in peers.PEERS]
    lines = [f"{name}"]
    for label, f in facts.items():
        if "seconds" not in f:
            lines.append(f"  {f['outcome']:>9}  {label}: {f.get('reason', '')}")
            continue
        against = [f"{first / f['seconds']:6.3f} of {base}" if first else "", ""]
        against[1] = f"{min(rivals) / f['seconds']:6.3f} of the best peer" if rivals else ""
        lines.append(f"  {f['seconds'] * 1e6:9.1f} us {f['tflops']:6.1f} TFLOP/s {' '.join(against)}  {label}")
    return "\n".join(lines)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("render")
    one.add_argument("label")
    one.add_argument("cases", type=Path)
    one.add_argument("--target", required=True)
    one.add_argument("--family", help="default: the first that can serve the row")
    one.add_argument("--out", type=Path, required=True)
    two = parts.add_parser("time")
    two.add_argument("variants", type=Path)
    two.add_argument("--peers", default="")
    two.add_argument("--fa3", type=Path)
    two.add_argument("--fa4", type=Path)
    two.add_argument("--base", help="the label that others are set against")
    two.add_argument("--rounds", type=int, default=9)
    two.add_argument("--min-time", type=float, default=0.4)
    two.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.part == "render":
        where = target.host() if args.target == "cpu" else target.known(args.target)
        return render_all(args.label, args.cases, where, args.family, args.out)
    where = target.gpu() or target.host()
    toolchain.require_nvcc() if where.is_gpu else toolchain.require_cxx()
    args.peers = [name for name in args.peers.split(",") if name]
    args.paths = {name: path for name, path in (("fa3", args.fa3), ("fa4", args.fa4)) if path}
    args.settings = run.Settings(rounds=args.rounds, min_seconds=args.min_time)
    time_all(json.loads(args.variants.read_text()), where, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
