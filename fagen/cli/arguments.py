"""What the commands share: problems from flags and TOML files, the target, and the two output streams.

People read stderr, programs read stdout: `say` writes to the first, `emit_json` to the second.
"""

from __future__ import annotations

import argparse
import itertools
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fagen import ops, schema
from fagen.cli import presets, softmax_arguments
from fagen.errors import InvalidArgument, MissingTool, UsageError
from fagen.notices import say
from fagen.ops.attention import flags
from fagen.ops.attention.parse import choices, head_dims, is_number, sizes, split, window
from fagen.ops.attention.problem import DTYPES, INTERVAL_KINDS, MASKS, Problem
from fagen.target import ARCHS, Target

# A problem as flags and TOML files spell it: names of settings, most of which take several values.
SETTINGS = {
    "op": "forward, backward, decode, forward_fp8 or softmax (default: forward)",
    "preset": "models whose layers are meant, llama3-8b,gemma3-4b; with it only op, dtype, lengths and batch",
    "dtype": "fp16, bf16 or fp32 (default: bf16 on a GPU, fp32 on the CPU)",
    "head_dim": "64,128, or 192-128 when q/k and v differ (default: 128)",
    "mask": f"{', '.join(MASKS)} (default: none)",
    "window": "L,R: keys visible left and right of the diagonal, 'none' for unbounded: 1024,0 or none,0; "
    "with mask intervals as well",
    "interval_kind": f"bounds a key column carries: {', '.join(INTERVAL_KINDS)} (default: lower1)",
    "softcap": "with a cap on the scores",
    "alibi": "with ALiBi slopes",
    "dropout": "with weights dropped at random",
    "tf32": "with products of fp32 numbers rounded to TF32 where a kernel does that",
    "unaligned": "of tensors whose rows do not start at multiples of 16 bytes",
    "deterministic": "with op backward: the same bits each time",
    "kv_dtype": "with op decode: fp8_e4m3 of a cache in fp8 (default: that of q)",
    "page": "with op decode: rows of a page of the cache, 1,16,64 (default: 0, not paged)",
    "sinks": "with op decode: each head has a logit without a value",
    "shared_kv": "with op decode: v is the first columns of k, in the same memory",
    "scale_block": "with op forward_fp8: rows of q and of k that share a scale, 64,128 (default: 0, those of a head)",
    "seqlen": "length of queries and keys: 1k,4k (default: 1k); with op decode of keys alone, with one query",
    "seqlen_q": "length of the queries alone",
    "seqlen_k": "length of the keys alone",
    "batch": "batch size (default: 1)",
    "heads": "heads of q (default: 16)",
    "kv_heads": "heads of k and v (default: as many as of q)",
    **softmax_arguments.SETTINGS,
}
_SWITCHES = ("softcap", "alibi", "dropout", "tf32", "unaligned", "deterministic", "sinks", "shared_kv")
_OF_OP = {"decode": ("kv_dtype", "page", "sinks", "shared_kv"), "forward_fp8": ("scale_block",)}
OPS = ("forward", "backward", "decode", "forward_fp8")  # whose problems these settings spell
_USABLE = 0.9  # of a device's memory: what runs there besides, and what verifying takes


# ---- problems ------------------------------------------------------------------------------------------------------


def expand(settings: Mapping[str, Any], target: Target | None = None) -> list[Problem]:
    """Every problem that the settings describe: lists multiply."""
    from fagen.ops.attention.decode_problem import KV_TORCH_DTYPES, PAGES  # which --help does not need

    for name in settings:
        if name not in SETTINGS:
            raise UsageError(f"unknown problem setting {name!r}", f"known: {', '.join(SETTINGS)}")
    default_dtype = "fp32" if target is not None and not target.is_gpu else "bf16"
    if settings.get("op") == softmax_arguments.OP:
        found: Any = softmax_arguments.expand(settings, default_dtype)
        return found
    softmax_arguments.refuse(settings)
    if "preset" in settings:
        return _expand_presets(settings, target)
    masks = settings.get("mask")
    if masks is None:
        masks = "intervals" if "interval_kind" in settings else "window" if "window" in settings else "none"
    masks = choices("mask", masks, MASKS)
    for name, able in (("window", ("window", "intervals")), ("interval_kind", ("intervals",))):
        if name in settings and not set(able) & set(masks):
            flag, needs = "--" + name.replace("_", "-"), " or ".join(map(repr, able))
            raise UsageError(f"{flag} needs mask {needs}", f"the masks are {', '.join(masks)}")
    if "window" in masks and "window" not in settings:
        raise UsageError("mask 'window' needs its width", remedy="add --window LEFT,RIGHT, like --window 1024,0")
    axes: dict[str, list[Any]] = {
        "op": choices("op", settings.get("op", "forward"), OPS),
        "dtype": choices("dtype", settings.get("dtype", default_dtype), DTYPES),
        "head_dim": head_dims(settings.get("head_dim", 128)),
        "mask": masks,
        "interval_kind": choices("interval kind", settings.get("interval_kind", "lower1"), INTERVAL_KINDS),
        "seqlen": _lengths(settings),
        "batch": sizes(settings.get("batch", 1)),
        "heads": sizes(settings.get("heads", 16)),
        "kv_heads": sizes(settings["kv_heads"]) if "kv_heads" in settings else [0],
        "kv_dtype": choices("kv dtype", settings["kv_dtype"], [*KV_TORCH_DTYPES]) if "kv_dtype" in settings else [""],
        "page": [int(word) for word in choices("page", settings.get("page", 0), [*map(str, PAGES)])],
        "scale_block": sizes(settings["scale_block"]) if "scale_block" in settings else [0],
    }
    _require_op(axes["op"], settings)
    bounds = window(settings["window"]) if "window" in settings else (-1, -1)
    switches = {name: settings.get(name, False) for name in _SWITCHES}
    for name, value in switches.items():
        if type(value) is not bool:
            raise UsageError(f"{name} is true or false, not {schema.shown(value)}")
    one_query = "seqlen_q" not in settings
    problems = [
        _problem(dict(zip(axes, point, strict=True)), bounds, dict(switches), one_query)
        for point in itertools.product(*axes.values())
    ]
    return list(dict.fromkeys(problems))


def _expand_presets(settings: Mapping[str, Any], target: Target | None) -> list[Problem]:
    """The layers of models, bf16 unless said otherwise, of the lengths and batch that are asked for."""
    mine = {name: value for name, value in settings.items() if name != "preset"}
    said = sorted(mine.keys() - {"op", "dtype", "seqlen", "seqlen_q", "seqlen_k", "batch"})
    if said:
        flags = ", ".join("--" + name.replace("_", "-") for name in said)
        raise UsageError(f"--preset says what {flags} would say", remedy="give the one or the other")
    found: list[Problem] = []
    for name in split(settings["preset"]):
        preset = presets.get(name)
        if preset.lacks:
            say(f"note: {name} has {preset.lacks}: fagen has no kernel for that, its layers are taken without it")
        for layer in preset.layers().values():
            found += expand({"dtype": "bf16", **layer, **mine}, target)
    return list(dict.fromkeys(found))


def _lengths(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    if "seqlen" in settings and ("seqlen_q" in settings or "seqlen_k" in settings):
        raise UsageError("--seqlen excludes --seqlen-q and --seqlen-k", remedy="give one or the other")
    if "seqlen_q" not in settings and "seqlen_k" not in settings:
        return [(n, n) for n in sizes(settings.get("seqlen", 1024))]
    of_q = settings.get("seqlen_q", settings.get("seqlen_k"))
    of_k = settings.get("seqlen_k", settings.get("seqlen_q"))
    return list(itertools.product(sizes(of_q), sizes(of_k)))


def _require_op(chosen: list[str], settings: Mapping[str, Any]) -> None:
    for op, names in _OF_OP.items():
        for name in names:
            if settings.get(name) and chosen != [op]:
                raise UsageError(f"--{name.replace('_', '-')} needs op {op}", f"the op is {', '.join(chosen)}")


def _problem(point: dict[str, Any], bounds: tuple[int, int], switches: dict[str, Any], one_query: bool) -> Problem:
    """`one_query`: the length of queries was not said, and decode has one."""
    (qk, v), (seqlen_q, seqlen_k), mask = point["head_dim"], point["seqlen"], point["mask"]
    left, right = bounds if mask in ("window", "intervals") else (-1, -1)
    unaligned, deterministic = switches.pop("unaligned"), switches.pop("deterministic")
    if point["op"] == "backward":
        switches["deterministic"] = deterministic
    elif deterministic:
        raise UsageError("--deterministic needs op backward", "forward always gives the same bits")
    if point["op"] == "decode":
        switches |= {name: point[name] for name in ("kv_dtype", "page")}
        seqlen_q = 1 if one_query else seqlen_q
    else:
        del switches["sinks"], switches["shared_kv"]
    if point["op"] == "forward_fp8":
        switches["scale_block"] = point["scale_block"]
    kind: type[Problem] = ops.get(point["op"]).problem
    return kind(
        dtype=point["dtype"],
        head_dim=qk,
        head_dim_v=v,
        mask=mask,
        intervals=point["interval_kind"] if mask == "intervals" else "",
        aligned=not unaligned and flags.aligned(point["dtype"], qk, v),
        batch=point["batch"],
        heads=point["heads"],
        kv_heads=point["kv_heads"],
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        window_left=left,
        window_right=right,
        **switches,
    )


def problems_in(path: Path | str, target: Target | None = None) -> list[Problem]:
    """The problems of a TOML file: `[[problem]]` tables whose keys are the flags' names, with _ for -."""
    try:
        document = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"problem file {path} cannot be read", str(error)) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"problem file {path} is not TOML", str(error)) from error
    tables = document.get("problem")
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables) or len(document) > 1:
        raise UsageError(
            f"problem file {path} has no [[problem]] tables alone", f"it has: {', '.join(document) or 'nothing'}"
        )
    problems: list[Problem] = []
    for number, table in enumerate(tables, 1):
        try:
            problems += expand(table, target)
        except (UsageError, InvalidArgument) as error:
            raise UsageError(f"{path}, problem {number}: {error.what}", error.numbers, error.remedy) from error
    return list(dict.fromkeys(problems))


# ---- verbs and flags -------------------------------------------------------------------------------------------------


def add_verb(subparsers: Any, name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a verb, its --json flag in it; `examples` stand below the flags."""
    parser = subparsers.add_parser(
        name, help=description, description=description, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="data on stdout as JSON")
    return parser


def add_problem_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("problem", "lists (a,b,c) multiply; sizes may end in k")
    for name, text in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        if name in (*_SWITCHES, *softmax_arguments.SWITCHES):
            group.add_argument(flag, action="store_true", default=None, help=text)
        else:
            group.add_argument(flag, metavar="L,R" if name == "window" else "LIST", help=text)
    group.add_argument("--problems", metavar="FILE.toml", help="[[problem]] tables with these names as keys")


def problems_from(args: argparse.Namespace, target: Target | None = None) -> list[Problem]:
    """The problems of the flags and of --problems; empty when none of them was given."""
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    problems = problems_in(args.problems, target) if args.problems else []
    if settings:
        problems += expand(settings, target)
    return list(dict.fromkeys(problems))


def one_problem(args: argparse.Namespace, target: Target | None = None) -> Problem:
    """Exactly one problem; the defaults when no flag was given."""
    problems = problems_from(args, target) or expand({}, target)
    if len(problems) != 1:
        raise UsageError(
            f"the flags describe {len(problems)} problems", f"{problems[0]}, {problems[1]}, ...", "give one"
        )
    return problems[0]


def require_memory(problems: Iterable[Problem], target: Target, index: int = 0) -> None:
    """That the device has room for each problem's tensors, said before anything is compiled for it."""
    from fagen.target import memory

    room = memory(target, index)
    for problem in problems:
        need = problem.bytes()
        if room and need > _USABLE * room:
            numbers = f"its inputs and outputs take {gib(need)}, {target.device} has {gib(room)}"
            raise UsageError(f"{problem} does not fit into memory", numbers, "ask for shorter sequences or fewer heads")


def gib(size: int) -> str:
    return f"{size / (1 << 30):.3g} GiB"


def add_target_flag(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(ARCHS)
    parser.add_argument(
        "--target", metavar="T", help=f"cpu, gpu, gpu:1 (or cuda:1), or one of {names} (default: the GPU, else the CPU)"
    )
    parser.add_argument("--arch", dest="target", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # its old name


def target_from(name: str | None) -> Target:
    """The target of a --target flag. Only `gpu` and the default look for a device."""
    from fagen import target

    if name is None:
        return target.detect()
    if name == "cpu":
        return target.host()
    word, _, index = name.partition(":")
    if word not in ("gpu", "cuda"):
        return target.known(name)
    if index and not is_number(index):
        raise UsageError(f"unknown target {name!r}", "a GPU is named gpu, gpu:0, gpu:1, ...")
    found = target.gpu(int(index or 0))
    if found is None:
        raise MissingTool(
            f"no GPU answers to {name!r}", remedy="fagen doctor says what is missing; --target cpu needs none"
        )
    return found


def present(name: str | None, target: Target, doing: str, instead: str) -> Target:
    """The device itself that --target `name` stands for, since times are taken on it; `doing` says what for."""
    from fagen.target import gpu

    if not target.is_gpu:
        return target
    found = gpu(int((name or "").partition(":")[2] or 0))
    if found is None or found.arch != target.arch:
        here = f"here is {found}" if found else "torch sees no GPU here"
        raise MissingTool(f"{doing} {target.arch} needs such a GPU", here, instead)
    return found


def count(word: str) -> int:
    """Of a flag that counts something; for argparse."""
    if not is_number(word) or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{schema.shown(word)} is no positive number")
    return int(word)
