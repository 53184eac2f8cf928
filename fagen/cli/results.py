"""The flags and checks that `fagen bench` and `fagen ablation` share: the clock, the device, where results go."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from fagen.cli import arguments
from fagen.errors import UsageError
from fagen.target import Target


def add_flags(
    parser: argparse.ArgumentParser, *, rounds: int, least: float, of: str
) -> tuple[argparse._ArgumentGroup, argparse._ArgumentGroup]:
    """Those of the clock and of the results; both groups, for more of them."""
    clock = parser.add_argument_group("clock")
    clock.add_argument(
        "--rounds", type=arguments.count, default=rounds, metavar="N", help=f"at least this many (default: {rounds})"
    )
    clock.add_argument(
        "--min-time", type=seconds, default=least, metavar="S", help=f"seconds a {of}, at least (default: {least})"
    )
    clock.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the inputs, and of random rows (default: 0)"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, metavar="FILE", help=f"everything, as JSON; written anew after each {of}")
    out.add_argument("--markdown", type=Path, metavar="FILE")
    out.add_argument("--csv", type=Path, metavar="FILE")
    out.add_argument("--plot", type=Path, metavar="FILE", help="TFLOP/s as .svg or .png; needs matplotlib")
    return clock, out


def seconds(word: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", word):
        raise argparse.ArgumentTypeError(f"{word!r} is no number of seconds")
    return float(word)


def require(args: argparse.Namespace) -> None:
    """That the results can be written, asked before a run, so that it is not lost at its end."""
    from fagen.bench import plot

    if args.plot:
        plot.require()
    for path in (args.out, args.markdown, args.csv, args.plot):
        if path and not path.parent.is_dir():
            raise UsageError(f"{path} cannot be written", f"there is no folder {path.parent}")


def present(name: str | None) -> Target:
    """The device itself: there is nothing to be timed on others."""
    target = arguments.target_from(name)
    found = arguments.present(name, target, "measuring on", "use --target cpu")
    if found.is_gpu:
        import torch

        torch.cuda.set_device(int((name or "").partition(":")[2] or 0))
    return found


def command() -> str:
    """As it was typed, but for the folders of this machine."""
    words = [re.sub(r"^(--?[\w-]+=)?/.*/", r"\1", word) for word in sys.argv[1:]]
    return shlex.join(["fagen", *words])
