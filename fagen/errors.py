"""Typed errors. Every message is at most three lines: what happened, the numbers, what to do."""

from __future__ import annotations

INTERRUPTED = 130  # the exit code after Ctrl-C


class FagenError(Exception):
    """Root of all errors raised on purpose. `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, what: str, numbers: str = "", remedy: str = "") -> None:
        self.what, self.numbers, self.remedy = what, numbers, remedy
        super().__init__("\n".join(line for line in (what, numbers, remedy) if line))

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.numbers, self.remedy)


class InvalidArgument(FagenError, ValueError, RuntimeError):
    """A call's arguments contradict each other or fall outside what attention is defined for.

    Also a RuntimeError, which is what PyTorch's own attention raises.
    """

    exit_code = 2


class InvalidType(InvalidArgument, TypeError):
    """An argument is not of the kind that is asked for: a list instead of a tensor, a word instead of a number."""


class UsageError(FagenError):
    """A command line or a problem file that cannot be understood."""

    exit_code = 2


class UnsupportedProblem(FagenError, NotImplementedError):
    """No family can serve the problem; the message names the first reason of each."""


class InvalidConfig(FagenError):
    """A config breaks a family's constraint."""

    exit_code = 2


class NoCandidate(FagenError):
    """A search ended without a single valid candidate."""

    exit_code = 3


class MissingTool(FagenError):
    """A compiler, a GPU or a package that the command needs is not there."""

    exit_code = 4


class BuildError(FagenError):
    """The compiler refused a kernel, or was killed. Keeps the command, the source path and the end of the log."""

    def __init__(self, what: str, numbers: str = "", remedy: str = "", *, log: str = "", killed: bool = False) -> None:
        super().__init__(what, numbers, remedy)
        self.log, self.killed = log, killed

    def __reduce__(self) -> tuple:
        return _rebuild_build_error, (self.what, self.numbers, self.remedy, self.log, self.killed)


def _rebuild_build_error(what: str, numbers: str, remedy: str, log: str, killed: bool) -> BuildError:
    return BuildError(what, numbers, remedy, log=log, killed=killed)


class CacheError(BuildError):
    """A built kernel cannot be kept or may not be loaded: a full disk, a folder that others may write. No fault of
    the kernel."""

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.numbers, self.remedy)


class LaunchError(FagenError):
    """A kernel could not be launched, or the device reported an error."""


class WrongResult(FagenError):
    """A kernel's output lies outside the bound that `verify` allows."""


class DatabaseError(FagenError):
    """A tuning database file cannot be used; the message names the file."""


class NewerDatabase(DatabaseError):
    """A tuning database file of a newer fagen: it is neither read nor replaced."""
