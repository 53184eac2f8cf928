"""The only reader of FAGEN_* environment variables, and where files of a user live."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from fagen.errors import UsageError

VARIABLES = {
    "FAGEN_CACHE_DIR": "folder of built kernels (default: the user cache directory)",
    "FAGEN_DB_DIR": "folder of the user's own tuned winners (default: the user data directory)",
    "FAGEN_NVCC": "the nvcc to build with (default: CUDA_HOME, then PATH)",
    "FAGEN_CXX": "the host C++ compiler (default: CXX, then g++, then c++)",
    "FAGEN_BUILD": "a call whose kernel is not built: wait for it; background: be served by another one, or PyTorch, "
    "until it is; never: an error (default: wait)",
    "FAGEN_DISABLE_JIT": "1: the same as FAGEN_BUILD=never (default: 0)",
    "FAGEN_STALE": "a winner whose kernel source changed since it was tuned: verify, trust or refuse (default: verify)",
    "FAGEN_EXTENSIONS": "Python modules with more ops and families, separated by commas; they are imported",
    "FAGEN_DEBUG": "1: lengths and indices of a cache on a GPU are checked, which waits for it (default: 0)",
    "FAGEN_QUIET": "1: no line on stderr when a first call compiles (default: 0)",
}

BUILD_MODES = ("wait", "background", "never")


def get(name: str) -> str | None:
    if name not in VARIABLES:
        raise KeyError(name)
    return os.environ.get(name) or None


def flag(name: str) -> bool:
    return (get(name) or "0").lower() not in ("0", "false", "no")


def build_mode() -> str:
    """What becomes of a call whose kernel is not built: wait, background or never."""
    word = get("FAGEN_BUILD") or BUILD_MODES[0]
    if word not in BUILD_MODES:
        raise UsageError(f"FAGEN_BUILD={word} is unknown", f"known: {', '.join(BUILD_MODES)}")
    return "never" if flag("FAGEN_DISABLE_JIT") else word


def forbidden() -> tuple[str, str]:
    """The setting that keeps calls from compiling, and the one that lets a command do it."""
    if flag("FAGEN_DISABLE_JIT"):
        return "FAGEN_DISABLE_JIT", "FAGEN_DISABLE_JIT=0"
    return f"FAGEN_BUILD={build_mode()}", "FAGEN_BUILD=wait"


def cache_dir() -> Path:
    return Path(get("FAGEN_CACHE_DIR") or platformdirs.user_cache_dir("fagen")).absolute()


def user_db_dir() -> Path:
    return Path(get("FAGEN_DB_DIR") or Path(platformdirs.user_data_dir("fagen")) / "tuning_db")


def runs_dir() -> Path:
    return Path(platformdirs.user_state_dir("fagen")) / "runs"


def data_dir(name: str) -> Path:
    """`templates` or `tuning_db`: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def settings() -> dict[str, str]:
    """Every FAGEN_* variable that is set, unknown ones among them."""
    return {name: value for name, value in os.environ.items() if name.startswith("FAGEN_")}
