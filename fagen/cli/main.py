"""The `fagen` command. A verb's module is imported when the verb is named, so that help answers at once."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fagen import __version__
from fagen.errors import INTERRUPTED, FagenError, MissingTool

VERBS = {
    "tune": "find the fastest kernel for these problems on this machine",
    "report": "write one page about a tuning run: what was tried, what mattered, who won",
    "bench": "measure against the other attention libraries that are installed here",
    "ablation": "measure what each design change gains, step by step, in one run",
    "explain": "say which kernel a problem gets here, and why no other",
    "build": "compile kernels ahead of their first use",
    "emit": "write a kernel as files that need neither Python nor torch",
    "db": "list, show, merge, compare, export, validate and prune tuned winners",
    "cache": "show, check and empty the folder of built kernels",
    "doctor": "find what is missing on this machine and what that costs",
    "completion": "print a script that completes fagen's verbs, options and values in a shell",
}
_EXAMPLES = """examples:
  fagen tune --budget 10m                                   the default problems of this machine
  fagen tune --dtype bf16 --head-dim 64,128 --mask causal --seqlen 1k,4k --heads 32 --kv-heads 8
  fagen explain --head-dim 128 --mask causal --seqlen 4k
  fagen emit --target sm_90 --head-dim 128 --dtype bf16 --mask causal --out kernel --example

exit codes: 0 fine, 1 failed, 2 usage, 3 no valid candidate, 4 missing toolchain or GPU, 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line and one remedy."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {message}\ntry {self.prog} --help\n")
        raise SystemExit(2)


def _parser(verb: str | None) -> Parser:
    listing = "\n".join(f"  {name:<12}{text}" for name, text in VERBS.items())
    parser = Parser(
        prog="fagen",
        usage="fagen VERB [options]",
        description=f"Generate, tune and use attention kernels.\n\nverbs (fagen VERB --help tells more):\n{listing}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fagen {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks; may stand after the verb as well")
    if verb in VERBS:
        subparsers = parser.add_subparsers(dest="verb", help=argparse.SUPPRESS, prog="fagen")
        importlib.import_module(f"fagen.cli.commands.{verb}").add(subparsers)
    return parser


def _run(argv: list[str]) -> int:
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, 1)
        sys.stderr.write(
            f"fagen: unknown verb {verb!r}{f', did you mean {close[0]}?' if close else ''}\ntry fagen --help\n"
        )
        return 2
    parser = _parser(verb)
    args = parser.parse_args(argv)
    if verb is None:
        parser.print_help(sys.stderr)
        return 2
    return importlib.import_module(f"fagen.cli.commands.{verb}").run(args)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _run(words)
    except FagenError as error:
        if debug:
            raise
        sys.stderr.write(f"fagen: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("fagen: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        package = error.name if isinstance(error, ModuleNotFoundError) else None
        if package and not package.startswith("fagen"):
            sys.stderr.write(
                f"fagen: this needs the package {package}, which is not installed\npip install {package}\n"
            )
            return MissingTool.exit_code
        first = (str(error).splitlines() or [""])[0]
        sys.stderr.write(
            f"fagen: unexpected {type(error).__name__}: {first}\nrun it again with --debug for the traceback\n"
        )
        return 1
