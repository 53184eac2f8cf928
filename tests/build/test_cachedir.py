"""The cache's folder: made for one user, refused where others may write, and nothing removed but what fagen made."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fagen import env
from fagen.build import cachedir, housekeeping, toolchain
from fagen.build.cache import find, make
from fagen.build.job import LIBRARY, LOG, MANIFEST
from fagen.cli import doctor, main
from fagen.errors import BuildError, CacheError
from tests.build.test_cache import job, number_of

pytestmark = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a folder for temporary files of its own."""
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "cache"


@pytest.fixture
def open_umask() -> object:
    before = os.umask(0)
    yield
    os.umask(before)


def entry(number: int = 1) -> Path:
    """What a build leaves in the cache, without the time it takes: a library that no test loads."""
    import hashlib
    import json

    this = job(number)
    key = this.key()
    path = cachedir.folder("kernels") / this.folder(key).name
    cachedir.make(path)
    files = {}
    for name in ("kernel.cpp", LIBRARY, LOG):
        cachedir.write(path / name, name.encode())
        files[name] = {"bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}
    manifest = {"key": key, "files": files, "facts": {}, "about": {"arch": "cpu"}}
    cachedir.write(path / MANIFEST, json.dumps(manifest).encode())
    return path


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the path another user's, or this process another user's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1, follow_symlinks=False)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- for one user alone -------------------------------------------------------------------------------------------


def test_whatever_the_umask_nobody_else_may_read_or_write(cache: Path, open_umask: object) -> None:
    assert number_of(make(job(1))) == 1
    with pytest.raises(BuildError):
        make(job(source="int f( {\n"))
    names = {"kernels", "failed", "locks", "tmp", cachedir.MARK}
    assert {path.name for path in cache.iterdir()} == names
    for path in [cache, *cache.rglob("*")]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, f"{path} {oct(path.stat().st_mode)}"


def test_folders_above_the_cache_are_private_too(cache: Path, open_umask: object, monkeypatch) -> None:
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(cache / "above" / "it"))
    entry()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in (cache, cache / "above", cache / "above" / "it"))


# ---- refused ------------------------------------------------------------------------------------------------------

PLACES = {
    "the root": lambda path: path.parent.parent,
    "the kernels": lambda path: path.parent,
    "the entry": lambda path: path,
    "the manifest": lambda path: path / MANIFEST,
    "the library": lambda path: path / LIBRARY,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_what_others_may_write_is_refused(place: Callable[[Path], Path], bits: int) -> None:
    path = entry()
    assert find(job()) is not None
    at = place(path)
    at.chmod(stat.S_IMODE(at.stat().st_mode) | bits)
    for look in (find, make):
        with pytest.raises(CacheError, match="other users may write") as caught:
            look(job())
        assert str(at) in str(caught.value) and "chmod" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_what_another_user_owns_is_refused(place: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = entry()
    give_away(place(path), monkeypatch)
    with pytest.raises(CacheError, match="belongs to another user"):
        find(job())
    with pytest.raises(CacheError, match="belongs to another user"):
        make(job())


def test_what_root_owns_serves_every_user(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to be root")
    entry()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert find(job()) is not None


@pytest.mark.parametrize("place", [PLACES["the kernels"], PLACES["the entry"], PLACES["the library"]])
def test_nothing_is_loaded_through_a_link(place: Callable[[Path], Path], tmp_path: Path) -> None:
    at = place(entry())
    at.rename(tmp_path / "elsewhere")
    at.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="symbolic link"):
        find(job())


def test_the_cache_itself_may_be_reached_through_a_link(cache: Path, tmp_path: Path) -> None:
    entry()
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    assert find(job()) is not None and len(housekeeping.entries()) == 1


def test_a_link_of_another_user_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """He could point it elsewhere between the check and the load."""
    if os.geteuid() != 0:
        pytest.skip("needs to be root")
    entry()
    (tmp_path / "link").symlink_to(tmp_path)
    give_away(tmp_path / "link", monkeypatch)
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "link" / "cache"))
    with pytest.raises(CacheError, match="another user may replace"):
        find(job())


def test_a_folder_that_anybody_may_replace_is_refused(tmp_path: Path) -> None:
    entry()
    tmp_path.chmod(0o777)
    with pytest.raises(CacheError, match="anybody may replace") as caught:
        find(job())
    assert str(tmp_path) in caught.value.numbers
    tmp_path.chmod(0o1777)
    assert find(job()) is not None


def test_a_call_is_served_without_a_cache_that_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fagen import api
    from fagen.runtime import binding

    monkeypatch.setattr(binding, "load", lambda: None)
    monkeypatch.setattr(binding, "_failure", None)  # what this test leaves there no other one may meet
    cache.mkdir(mode=0o700)
    cache.chmod(0o777)
    q = torch.randn(1, 5, 2, 24)
    with pytest.warns(UserWarning, match="other users may write"):
        out = api.attention(q, q, q)
    t = q.transpose(1, 2)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(t, t, t).transpose(1, 2))


def test_the_doctor_says_so(cache: Path) -> None:
    path = entry()
    path.chmod(0o777)
    found = [f for f in doctor.examine() if f.name.startswith("cache") and f.status == "problem"]
    assert [f.name for f in found] == ["cache entries"]
    assert "0777" in found[0].detail and "chmod" in found[0].remedy and found[0].cost
    cache.chmod(0o770)
    found = [f for f in doctor.examine() if f.name.startswith("cache") and f.status == "problem"]
    assert [f.name for f in found] == ["cache"]
    assert "0770" in found[0].detail and "chmod" in found[0].remedy and found[0].cost


# ---- what is not fagen's --------------------------------------------------------------------------------------------


def test_a_folder_with_other_things_in_it_is_no_cache(cache: Path) -> None:
    for name in ("kernels/mine", "tmp/1234-0123456789ab", "failed", "verified", "thesis"):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (1, 1))
    before = everything(cache)
    for act in (lambda: make(job()), housekeeping.clear, housekeeping.entries):
        with pytest.raises(CacheError, match="no cache of fagen") as caught:
            act()
        assert "thesis" in caught.value.numbers and "FAGEN_CACHE_DIR" in caught.value.remedy
    assert main.main(["cache", "clear"]) == 1
    assert everything(cache) == before


def test_a_mark_of_another_program_is_none(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    (cache / cachedir.MARK).write_text("Signature: 8a477f597d28d172789f06886806bc55\n# made by another program\n")
    with pytest.raises(CacheError, match="no cache of fagen"):
        cachedir.folder("kernels")


@pytest.mark.parametrize("names", [(), ("lost+found",), ("kernels", "failed", "locks", "tmp", "verified")])
def test_an_empty_folder_and_an_older_cache_are_taken(names: tuple[str, ...], cache: Path) -> None:
    cache.mkdir(mode=0o755)
    for name in names:
        (cache / name).mkdir(mode=0o755)
    path = entry()
    assert find(job()) is not None
    assert (cache / cachedir.MARK).read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    assert housekeeping.clear()[0] == 1 and not path.exists()


def test_clearing_leaves_what_fagen_did_not_make(cache: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    own, with_more, given = entry(1), entry(2), entry(3)
    (with_more / "notes.txt").touch()
    outside = tmp_path / "outside"
    (outside / "kernel.so").mkdir(parents=True)
    (outside / "kernel.cpp").touch()
    link = cache / "kernels" / f"probe-{'0' * 16}"
    link.symlink_to(outside)
    others = [cache / "kernels" / "mine", cachedir.folder("failed") / "mine", cachedir.folder("tmp") / "1-0123456789ab"]
    for path in others:
        path.mkdir()
        os.utime(path, (1, 1))
    verdict, note = cachedir.folder("verified") / "0123abcd-cpu-some.json", cache / "verified" / "notes.txt"
    for path in (verdict, note):
        path.touch()
    (cache / "verified" / "link.json").symlink_to(outside / "kernel.cpp")
    if os.geteuid() == 0:
        give_away(given, monkeypatch)
    kept = [with_more / "kernel.so", with_more / "notes.txt", link, *others, note, outside / "kernel.so"]
    kept += [outside / "kernel.cpp", cache / "verified" / "link.json"]
    kept += [given / "kernel.so"] if os.geteuid() == 0 else []
    for words in (["cache", "verify", "--remove"], ["cache", "clear"]):
        main.main(words)
        assert all(os.path.lexists(path) for path in kept)
        assert "left alone" in capsys.readouterr().err
    assert not own.exists() and not verdict.exists()


@pytest.mark.parametrize("name", ["kernels", "failed", "verified"])
def test_clearing_follows_no_link(name: str, cache: Path, tmp_path: Path) -> None:
    """Not even to entries that look like fagen's."""
    path = entry()
    path.parent.rename(tmp_path / "outside")
    (tmp_path / "outside" / "0123abcd-cpu-some.json").touch()
    (cache / name).symlink_to(tmp_path / "outside")
    before = everything(tmp_path / "outside")
    with pytest.raises(CacheError, match="symbolic link"):
        housekeeping.clear()
    assert everything(tmp_path / "outside") == before


# ---- what killed processes left -------------------------------------------------------------------------------------

_MAKE = """
import sys
from pathlib import Path
from fagen.build import cachedir
for folder in sys.argv[1:]:
    kept = cachedir.Scratch(Path(folder))
    (kept.path / "large").mkdir()
print("made", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(cache: Path) -> None:
    temporary = Path(tempfile.gettempdir())
    folders = [cachedir.folder("tmp"), temporary]
    command = [sys.executable, "-c", _MAKE, *map(str, folders)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        for folder in folders:
            cachedir.sweep(folder)
            assert len(list(folder.glob("fagen-*/large"))) == 1, "its maker lives"
        process.kill()
    assert number_of(make(job(5))) == 5
    assert not list(cache.glob("tmp/*")) and not list(temporary.iterdir())


def test_only_marked_folders_of_this_user_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = Path(tempfile.gettempdir())
    unmarked, marked_by_another, link, given = (temporary / f"fagen-0123456789a{letter}" for letter in "abcd")
    named, outside = temporary / "fagen-mine", tmp_path / "outside"
    for path in (unmarked, marked_by_another, named, given, outside):
        path.mkdir()
        if path != unmarked:
            (path / cachedir.MARK).write_bytes(cachedir._MARK_TEXT if path != marked_by_another else b"Signature: ...")
    link.symlink_to(outside)
    cachedir.sweep(tmp_path / "nowhere")
    give_away(given, monkeypatch)
    before = everything(temporary)
    cachedir.sweep(temporary)
    assert everything(temporary) == before and (outside / cachedir.MARK).exists()


def test_a_forked_copy_leaves_the_makers_folder() -> None:
    made = cachedir.Scratch(Path(tempfile.gettempdir()))
    child = os.fork()
    if child == 0:
        made.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert made.path.is_dir()
    made.remove()
    assert not made.path.exists()


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a b:c$d$$e", "quote'\"`\\", "line\nbreak\t*?[x]#&;|"], ids=["plain", "shell", "rest"]
)
def test_a_cache_of_any_name_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / name))
    assert number_of(make(job(3))) == 3
    with pytest.raises(BuildError, match="error") as caught:
        make(job(source="int f( {\n"))
    assert "kernel.cpp:1" in caught.value.log


@pytest.mark.skipif(toolchain.nvcc() is None, reason="needs nvcc")
def test_a_cache_of_any_name_builds_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "a b:c$d'e\nf"))
    home = toolchain.cuda_home(toolchain.require_nvcc())
    link = (f"-L{home}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread")
    made = make(job(4, suffix=".cu", flags=("-arch=sm_80",), link_flags=link, arch="sm_80"))
    assert number_of(made) == 4


def test_a_relative_cache_is_where_the_process_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAGEN_CACHE_DIR", "here")
    assert env.cache_dir() == tmp_path / "here"
    assert number_of(make(job(6))) == 6


# ---- processes ------------------------------------------------------------------------------------------------------

_FORK = """
import os, signal, threading, types
import torch
import fagen
from fagen.build import compiler
from fagen.dispatch import freshness
from fagen.runtime import binding
from fagen.errors import BuildError

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork either
inside, q, disowned = threading.Event(), torch.randn(1, 5, 2, 16, dtype=torch.float64), []
t = q.transpose(1, 2)
want = torch.nn.functional.scaled_dot_product_attention(t, t, t).transpose(1, 2)

def never():
    with compiler._lock, freshness._one_at_a_time:
        inside.set()
        threading.Event().wait()

def fail():
    raise BuildError("no binding in this test")

binding._build = never
compiler._idle.append(types.SimpleNamespace(disown=lambda: disowned.append(os.getpid())))
threading.Thread(target=lambda: fagen.attention(q, q, q), daemon=True).start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)  # a hang ends here
    binding._build = fail
    torch.testing.assert_close(fagen.attention(q, q, q), want)
    with compiler._lock, freshness._one_at_a_time:
        os._exit(7 if disowned == [os.getpid()] and not compiler._idle else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(compiler._idle), flush=True)
os._exit(0)
"""


def test_a_child_forked_during_a_first_call_makes_calls_of_its_own() -> None:
    """All locks are held by a thread that the child does not have, and the builder is its parent's."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _FORK], capture_output=True, text=True)
    assert done.stdout.split() == ["7", "1"], (done.stdout, done.stderr[-3000:])
