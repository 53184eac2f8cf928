"""fagen bench: our kernels against the peers that are installed here, right before they are timed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fagen.bench import output
from fagen.bench.rows import TRAINING
from fagen.cli import arguments, results, softmax_arguments
from fagen.errors import INTERRUPTED, UsageError
from fagen.notices import emit_json, say
from fagen.ops.attention.parse import choices
from fagen.target import Target

if TYPE_CHECKING:
    from fagen.bench.rows import Row
    from fagen.ops.attention.problem import Problem

_EXAMPLES = """examples:
  fagen bench                                      the suite `peers` against what is installed; on a CPU a small suite
  fagen bench --suite peers,masks --peers cudnn,fa3,fa4 --fa3 lib/_C.so --fa4 lib/fa4 --out bench.json --plot bench.svg
  fagen bench --head-dim 128 --mask causal --seqlen 4k,16k --heads 32 --kv-heads 8 --peers none
  fagen bench --suite peers --filter 'd64 causal' --markdown bench.md
  fagen bench --suite peers --op backward          the gradients alone; with --deterministic, the same bits each time
  fagen bench --op training --suite training --peers cudnn,fa2,fa3   forward and backward by autograd, peak memory
  fagen bench --op backward --suite deterministic --peers plain,fa3  the same bits each time, beside ours in any order
  fagen bench --op decode --suite decode,paged     a step of decoding on a cache, contiguous and in pages
  fagen bench --suite random --seed 7              60 problems that nobody tuned
  fagen bench --suite fp8 --fa3 lib/_C.so          forward on fp8 numbers, ours in 16 bits beside it
  fagen bench --suite softmax                      fagen.softmax against torch.softmax, eager and compiled
  fagen bench --out new.json --compare old.json    exit code 1 where a row fell by more than the noise
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    about = "Verify and time fagen.attention, or its gradients, against other libraries, interleaved, in one run."
    parser = arguments.add_verb(subparsers, "bench", about, _EXAMPLES)
    what = parser.add_argument_group("rows")
    what.add_argument(
        "--suite",
        metavar="S",
        help="peers, models, masks, documents, varlen, deterministic, dropout, ampere, random, small, fp32, fp8, "
        "softmax, or several (default: peers; small on a CPU); with --op training: training; with --op "
        "decode: decode, paged, ragged, mixed, mla",
    )
    what.add_argument("--filter", metavar="REGEX", help="the rows whose name this matches")
    arguments.add_problem_flags(parser)
    arguments.add_target_flag(parser)
    others = parser.add_argument_group("peers", "docs/bench.md says how each is found")
    others.add_argument(
        "--peers", default="all", metavar="P",
        help="all, none, or a list of cudnn, fa2, flash_attn, fa3, fa4, flex, flashinfer, flash_mla, sdpa, efficient, "
        "math (default: all, which leaves out the last three on a GPU)",
    )  # fmt: skip
    others.add_argument(
        "--family", metavar="F", help="hold ours to one family (default: whatever dispatch picks, as a user calls it)"
    )
    others.add_argument("--fa3", type=Path, metavar="FILE", help="library of FlashAttention 3: its _C.so")
    others.add_argument("--fa4", type=Path, metavar="DIR", help="folder of FlashAttention 4's unpacked wheels")
    clock, out = results.add_flags(parser, rounds=15, least=0.5, of="row")
    clock.add_argument("--host", action="store_true", help="host time of a call as well, at a launch-bound size")
    out.add_argument("--compare", type=Path, metavar="OLD", help="a result of --out: exit code 1 if rows fell")


def run(args: argparse.Namespace) -> int:
    from fagen.bench import compare, peers

    target = results.present(args.target)
    chosen = rows_from(args, target)
    _require_op(args, chosen[0].measured)
    names = peers.chosen(args.peers, "cuda" if target.is_gpu else "cpu", chosen[0].measured)
    old = compare.read(args.compare) if args.compare else None
    if old:
        compare.require_same(old, target.device, chosen[0].measured)
    results.require(args)
    result: dict[str, Any] = {}
    try:
        _measure(args, target, chosen, names, result)
    except KeyboardInterrupt:
        if not result.get("rows"):
            raise
        say(f"interrupted after {len(result['rows'])} of {len(chosen)} rows")
        _report(args, result, None)
        return INTERRUPTED
    return _report(args, result, old)


def _require_op(args: argparse.Namespace, op: str) -> None:
    """That the other flags go with the op of the rows."""
    from fagen import families

    if args.family and (its := families.get(args.family).op) != op:
        raise UsageError(f"family {args.family} computes {its}, the rows are of {op}", remedy=f"add --op {its}")
    if args.host and op != "forward":
        raise UsageError("--host times calls of forward", f"the rows are of {op}")


def rows_from(args: argparse.Namespace, target: Target) -> list[Row]:
    """The suites' rows, then the problems of flags and files, all of one op; what the filter leaves of them."""
    from fagen.bench import rows, suites

    problems = _problems(args, target)
    op = _op(args, problems)
    if op == softmax_arguments.OP:
        if args.suite:
            raise UsageError("--op softmax measures problems of flags", remedy="--suite softmax goes by --op backward")
        problems = problems or arguments.expand({"op": op}, target)
    same_bits = bool(args.deterministic)
    problems = [rows.as_op(problem, op, same_bits=same_bits) for problem in problems]
    arguments.require_memory(problems, target, int((args.target or "").partition(":")[2] or 0))
    words = args.suite.split(",") if args.suite else [] if problems else [suites.default(target, op)]
    found: list[Row] = []
    for word in words:
        if word not in suites.SUITES:
            raise UsageError(f"suite {word!r} is unknown", f"known: {', '.join(suites.SUITES)}")
        found += suites.suite(word, target, args.seed, op, same_bits=same_bits)
    found += [rows.row_of_op(rows.of_problem(problem), op) for problem in problems]
    try:
        wanted = re.compile(args.filter or "")
    except re.error as error:
        raise UsageError(f"--filter {args.filter!r} is no regular expression", str(error)) from error
    found = list({row.name: row for row in found if wanted.search(row.name)}.values())
    if len({row.measured for row in found}) > 1:
        raise UsageError("a run measures one op", "suite softmax is another than that of attention's rows")
    if not found:
        raise UsageError("no row is left to measure", f"--filter {args.filter!r} matches none")
    return found


def _problems(args: argparse.Namespace, target: Target) -> list[Problem]:
    """Those of flags and files. --op and --deterministic alone describe none: they are of suites and files, too."""
    both = {"op": None, "deterministic": None}
    if all(getattr(args, name) is None for name in arguments.SETTINGS if name not in both):
        changed: dict[str, Any] = both
    else:
        changed = {"op": "backward"} if args.op == TRAINING else {}
    return arguments.problems_from(argparse.Namespace(**{**vars(args), **changed}), target)


def _op(args: argparse.Namespace, problems: list[Problem]) -> str:
    """The one op that is measured: that of --op, else that of the problems."""
    asked = (
        choices("op", args.op, (*arguments.OPS, TRAINING, softmax_arguments.OP))
        if args.op
        else sorted({p.op for p in problems}) or ["forward"]
    )
    if len(asked) != 1:
        raise UsageError(f"a run measures one op, not {' and '.join(asked)}", remedy="give --op one of them")
    if args.deterministic and asked not in (["backward"], [TRAINING]):
        raise UsageError("--deterministic needs op backward", f"{asked[0]} always gives the same bits")
    return asked[0]


def _measure(
    args: argparse.Namespace, target: Target, chosen: list[Row], names: list[str], result: dict[str, Any]
) -> None:
    """Fills the result, row by row."""
    from fagen.bench import peers, prebuild, report, rows, run
    from fagen.db.record import environment, now
    from fagen.timing import load

    paths = {name: getattr(args, name) for name in ("fa3", "fa4") if getattr(args, name)}
    op = chosen[0].measured
    here, absent = peers.load(names, "cuda" if target.is_gpu else "cpu", paths, op)
    settings = run.Settings(args.rounds, args.min_time, args.seed)
    result |= {
        "format": run.FORMAT, "op": op, "command": results.command(), "date": now(), "device": target.device,
        "arch": target.arch, "environment": environment(target), "settings": vars(settings), "complete": False,
        "peers": {
            name: {"version": here[name].version if name in here else "", "absent": absent.get(name, "")}
            for name in names
        },
        "limit": {"what": "", "samples": [], "tflops": 0.0, "gbps": 0.0}, "rows": [], "host": None,
        "family": args.family,
        "summary": run.summary([]),
    }  # fmt: skip
    say(f"{target}: {len(chosen)} rows of {op}, {', '.join([peers.OURS, *here])}")
    if busy := load.note(target):
        say(f"note     {busy}")
    for text in report.absent(result["peers"]):
        say(text)
    plain = [rows.plain(row) for row in chosen] if peers.PLAIN in here else []
    prebuild.build([*chosen, *plain], target, say, args.family)

    cpu = report.on_cpu(result)

    def on_row(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        result["summary"] = run.summary(result["rows"])
        say(f"{len(result['rows']):>3}/{len(chosen)}  {report.line(row, report.participants(result), cpu)}")
        output.save(args.out, result)  # a run that is cut off keeps what it had

    def on_sample(sample: dict[str, Any]) -> None:
        result["limit"]["samples"].append(sample)
        say(f"limit    {report.rates(sample, cpu)}")
        if sample.get("throttled"):
            say(f"note     {sample['throttled']}")

    prepares = {name: loaded.prepare for name, loaded in here.items()}
    hooks: dict[str, Any] = {"on_row": on_row, "on_sample": on_sample}
    _, machine = run.bench(chosen, prepares, target, settings, held=args.family, **hooks)
    result["limit"] |= {"what": machine.what, **machine.limits()}
    if args.host:
        result["host"] = run.host(_with_sdpa(prepares), target)
    result["complete"] = True
    output.save(args.out, result)


def _with_sdpa(prepares: dict[str, Any]) -> dict[str, Any]:
    """What users without any library call."""
    from fagen.bench import sdpa

    return prepares | {"sdpa": sdpa.sdpa({}).by_op["forward"]}


def _report(args: argparse.Namespace, result: dict[str, Any], old: dict[str, Any] | None) -> int:
    from fagen.bench import compare, plot, report

    say()
    say(report.table(result))
    for text in report.closing(result) + (report.host(result) if result["host"] else []):
        say(text)
    falls: list[dict[str, Any]] = []
    if old:
        falls, lonely = compare.regressions(result, old)
        result["regressions"] = falls
        output.save(args.out, result)
        for text in compare.words(falls, lonely):
            say(text)
    if args.markdown:
        args.markdown.write_text(report.markdown(result))
    if args.csv:
        args.csv.write_text(report.as_csv(result))
    if args.plot:
        plot.draw(result, args.plot)
    if args.json:
        emit_json(result)
    return 1 if falls or result["summary"]["ours_not_ok"] else 0
