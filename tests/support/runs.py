"""Tuning runs in processes of their own, and a PostgreSQL server, for tests that kill them."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fagen.tuner import journal

ROOT = Path(__file__).parents[2]


def patient(seconds: float) -> float:
    """A limit for what takes long on a busy machine: as many times longer as processes want to run on a core."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


PATIENCE = patient(240.0)  # seconds for anything that a busy machine may take


def until(happened: Callable[[], object], child: subprocess.Popen | None = None) -> None:
    """Wait for it, as long as the child lives."""
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end or (child is not None and child.poll() is not None):
            said = ""
            if child is not None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                said = child.communicate()[1].decode()
            raise AssertionError(f"it did not happen: {said}")
        time.sleep(0.02)


def begin(
    folder: Path, trials: int = 50, name: str = "runs", stderr: int = subprocess.PIPE, **options: object
) -> subprocess.Popen:
    """`fake_family.main`; FAKE_STYLES is taken over from here. It is slow enough to be ended in the middle."""
    command = [sys.executable, "-m", "tests.support.fake_family", str(folder / name), str(folder / "db"), str(trials)]
    paths = [str(ROOT), *sys.path]
    environment = {"FAKE_PACE": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment["FAKE_OPTIONS"] = json.dumps(options)
    return subprocess.Popen(command, env=environment, stderr=stderr, start_new_session=True)


def rows(folder: Path) -> list[dict]:
    """Of the one run below a folder, or of a run's folder."""
    paths = [folder / journal.TRIALS, *folder.glob(f"*/{journal.TRIALS}")]
    return [row for path in paths for row in journal.read_lines(path)]


def end(child: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    os.kill(child.pid, number)
    child.wait(PATIENCE)
    if child.stderr:
        child.stderr.close()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- PostgreSQL -----------------------------------------------------------------------------------------------------


def postgres_tool(name: str) -> str | None:
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    return shutil.which(name, path=os.pathsep.join(places))


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A server of our own; its URL. It refuses to run as root, so there it runs as somebody else."""
    folder, port = Path(tempfile.mkdtemp(prefix="fagen-postgres-")), _free_port()
    user: dict[str, object] = {}
    if os.getuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        owner = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    data, secret = folder / "data", folder / "secret"
    secret.write_text("open sesame\n")
    secret.chmod(0o644)
    common = {"cwd": folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}, **user}
    make = [postgres_tool("initdb"), "-D", str(data), "-U", "fagen", "-A", "scram-sha-256", f"--pwfile={secret}", "-N"]
    subprocess.run(make, check=True, capture_output=True, **common)
    with open(folder / "log", "wb") as log:
        serve = [postgres_tool("postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)]
        server = subprocess.Popen([*serve, "-c", "fsync=off"], stdout=log, stderr=log, **common)
    try:
        until(lambda: _accepts(port), server if server.poll() is not None else None)
        yield f"postgresql://fagen:open%20sesame@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _accepts(port: int) -> bool:
    """Whether it takes a login; while it starts up it closes the connection or says no."""
    import psycopg

    with contextlib.suppress(psycopg.OperationalError):
        psycopg.connect(f"postgresql://fagen:open%20sesame@127.0.0.1:{port}/postgres", connect_timeout=2).close()
        return True
    return False
