"""The build cache: what is a hit, and that nothing that goes wrong ends in a hang or a wrong library."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fagen import ops
from fagen.build import cachedir, toolchain
from fagen.build.cache import find, make
from fagen.build.compiler import _idle, parse_ptxas, plain_name
from fagen.build.job import Artifact, Job
from fagen.errors import BuildError, MissingTool
from fagen.ops.attention.problem import Problem

# a source whose compilation outlasts every limit of these tests
ENDLESS = "#define A(x) x x x x x x x x x x\nint f() { int a = 0; A(A(A(A(A(A(A(++a;))))))) return a; }\n"


def job(number: int = 1, **changes: object) -> Job:
    fields: dict = {
        "name": "probe",
        "source": f'extern "C" int number() {{ return {number}; }}\n',
        "suffix": ".cpp",
        "flags": ("-O1",),
        "link_flags": (),
        "arch": "cpu",
    }
    return Job(**fields | changes)


def number_of(artifact: Artifact) -> int:
    return ctypes.CDLL(str(artifact.path)).number()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler of ours in front of the real one; `rewrite` says what it does before it compiles."""
    path = tmp_path / "g++"
    path.write_text(f'#!/bin/sh\n\n\nexec {toolchain.require_cxx()} "$@"\n')
    path.chmod(0o755)
    rewrite(path, ":")
    monkeypatch.setenv("FAGEN_CXX", str(path))
    return path


def rewrite(path: Path, first: str, version: str = "probe 1.0") -> None:
    lines = path.read_text().splitlines()
    lines[1] = f'[ "$1" = --version ] && echo "{version}" && exit 0'
    lines[2] = f'case "$*" in *kernel.cpp*) {first} ;; esac'
    path.write_text("\n".join(lines) + "\n")
    os.utime(path, ns=(time.time_ns(), time.time_ns()))


def no_leftovers(cache: Path) -> bool:
    return not any((cache / "tmp").iterdir())


# ---- hits and misses ----------------------------------------------------------------------------------------------


def test_builds_once(cache: Path) -> None:
    first = make(job(7))
    assert number_of(first) == 7 and first.facts["compile_seconds"] > 0
    before = first.path.stat().st_mtime_ns
    again = make(job(7))
    assert again == first and again.path.stat().st_mtime_ns == before
    assert {p.name for p in first.path.parent.iterdir()} == {"kernel.cpp", "kernel.so", "build.log", "manifest.json"}
    assert no_leftovers(cache)


def test_find_never_compiles() -> None:
    assert find(job(8)) is None
    make(job(8))
    assert find(job(8)) is not None


@pytest.mark.parametrize(
    "changes",
    [{"source": "int x;"}, {"flags": ("-O2",)}, {"link_flags": ("-lm",)}, {"arch": "sm_80"}, {"links_torch": True}],
)
def test_all_that_changes_the_binary_changes_the_key(changes: dict) -> None:
    assert job(**changes).key() != job().key()


def test_a_name_does_not_change_the_key() -> None:
    assert job(name="other", about={"a": 1}).key() == job().key()


def test_the_version_of_torch_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes milliseconds, and every call of a new size asks for a key."""
    import importlib.metadata

    asked: list[str] = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: asked.append(name) or "1.0")
    toolchain.torch_version.cache_clear()
    assert job(1).key() == job(1).key() != job(2).key()
    toolchain.torch_version.cache_clear()
    assert asked == ["torch"]


def test_native_code_is_keyed_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    from fagen import target

    native = job(flags=("-march=native",))
    here = native.key()
    monkeypatch.setattr(target, "host", lambda: target.Target("cpu", "another processor", 4, simd="neon"))
    assert native.key() != here


def test_a_changed_compiler_is_a_miss(compiler: Path) -> None:
    first = make(job())
    rewrite(compiler, ":", version="probe 2.0")
    assert find(job()) is None
    assert make(job()).key != first.key


def test_a_wrapped_compiler_counts_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAGEN_CXX", raising=False)
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert toolchain.cxx() is not None and toolchain.cxx().name == "g++"  # type: ignore[union-attr]


# ---- damage -------------------------------------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    data = (folder / "kernel.so").read_bytes()
    (folder / "kernel.so").write_bytes(data[: len(data) // 2])


def _flip(folder: Path) -> None:
    data = bytearray((folder / "kernel.so").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "kernel.so").write_bytes(bytes(data))


def _torn_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def _other_key(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"key": "0" * 64}))


def _odd_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('["not", "an", "object"]')


def _relist(folder: Path, change: Callable[[dict], dict]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": change(manifest["files"])}))


def _no_files(folder: Path) -> None:
    _relist(folder, lambda files: {})


def _no_library(folder: Path) -> None:
    _relist(folder, lambda files: {name: facts for name, facts in files.items() if name != "kernel.so"})


def _a_file_elsewhere(folder: Path) -> None:
    _relist(folder, lambda files: files | {f"../{folder.name}/kernel.so": files["kernel.so"]})


def _another_size(folder: Path) -> None:
    _relist(folder, lambda files: files | {"kernel.so": files["kernel.so"] | {"bytes": 1}})


def _deep_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip,
        _torn_manifest,
        _other_key,
        _odd_manifest,
        _no_files,
        _no_library,
        _a_file_elsewhere,
        _another_size,
        _deep_manifest,
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "kernel.so").unlink(),
    ],
)
def test_a_damaged_entry_is_a_miss_and_is_replaced(damage, cache: Path) -> None:  # noqa: ANN001
    first = make(job(3))
    damage(first.path.parent)
    assert find(job(3)) is None
    again = make(job(3))
    assert number_of(again) == 3 and find(job(3)) == again
    assert no_leftovers(cache)


def test_a_file_where_the_entry_should_be_is_replaced() -> None:
    folder = job(4).folder(job(4).key())
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    assert number_of(make(job(4))) == 4


# ---- failures -----------------------------------------------------------------------------------------------------


def test_a_compile_error_says_where(cache: Path) -> None:
    with pytest.raises(BuildError) as caught:
        make(job(source="int f( {\n"))
    message = str(caught.value)
    assert len(message.splitlines()) <= 3 and "error:" in message and not caught.value.killed
    kept = Path(message.rpartition(": ")[2])
    assert (kept / "kernel.cpp").read_text() == "int f( {\n" and "error:" in (kept / "build.log").read_text()
    assert "error:" in caught.value.log and no_leftovers(cache)


def test_a_build_past_its_time_is_killed_with_all_its_processes(cache: Path) -> None:
    make(job())  # the child has imported torch, so that the time measured is the compiler's
    with pytest.raises(BuildError, match="ran past its limit of 1 s") as caught:
        make(job(source=ENDLESS), timeout=1)
    assert caught.value.killed
    assert not _compilers_of(cache) and no_leftovers(cache)
    assert number_of(make(job(6))) == 6  # and the next one builds


def _compilers_of(cache: Path) -> list[str]:
    """Command lines of running processes that work in the cache, patient with those that are just ending."""
    for _ in range(2400):
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "cwd").startswith(str(cache)):
                    found.append((entry / "cmdline").read_text(errors="replace"))
            except OSError:
                continue
        if not found:
            return []
        time.sleep(0.1)
    return found


def test_a_killed_compiler_is_told_from_an_error(compiler: Path) -> None:
    rewrite(compiler, "kill -9 $$")
    with pytest.raises(BuildError, match="the compiler was killed") as caught:
        make(job())
    assert caught.value.killed
    rewrite(compiler, ":")
    assert number_of(make(job())) == 1


def test_a_killed_build_process_is_an_error_and_then_replaced(compiler: Path) -> None:
    make(job())
    builder = _idle[-1]._process
    rewrite(compiler, f"kill -9 {builder.pid}; sleep 1")
    with pytest.raises(BuildError, match="the build process died"):
        make(job(2))
    rewrite(compiler, ":")
    assert number_of(make(job(2))) == 2


def test_a_full_disk_at_the_compiler(compiler: Path) -> None:
    rewrite(compiler, 'echo "error writing to kernel.o: No space left on device" >&2; exit 1')
    with pytest.raises(BuildError, match="no space left") as caught:
        make(job())
    assert "fagen cache clear" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("where", [(os, "mkdir"), (cachedir, "write"), (os, "rename")], ids=lambda where: where[1])
def test_a_full_disk_on_our_side(where: tuple, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def full(*args: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make(job())
    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        with pytest.raises(BuildError, match="(?i)no space left") as caught:
            make(job(9))
    assert "FAGEN_CACHE_DIR" in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    assert number_of(make(job(9))) == 9


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_cache_serves_hits_and_builds_for_this_process(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hit = make(job(1))
    real = os.mkdir

    def refuse(path: Path, *args: object, **named: object) -> None:
        if str(path).startswith(os.environ["FAGEN_CACHE_DIR"]):
            raise OSError(code, os.strerror(code))
        real(path, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "mkdir", refuse)
    assert make(job(1)) == hit
    with pytest.warns(UserWarning, match="cannot be written"):
        made = make(job(2))
    assert number_of(made) == 2 and find(job(2)) is None


def test_what_is_built_for_this_process_is_removed_by_it_alone(tmp_path: Path) -> None:
    code = """
import os, warnings
from pathlib import Path
from fagen.build import cache
from tests.build.test_cache import job
warnings.simplefilter("ignore")
made = cache.make(job(16))
child = os.fork()
if child == 0:
    raise SystemExit  # runs what was registered with atexit
os.waitpid(child, 0)
print(made.path.exists(), made.path.parents[1], flush=True)
"""
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"FAGEN_CACHE_DIR": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "temporary")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    exists, folder = done.stdout.split()
    assert exists == "True", done.stderr
    assert Path(folder).parent == tmp_path / "temporary" and not list((tmp_path / "temporary").glob("fagen-*"))


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FAGEN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert number_of(make(job(11))) == 11


def test_a_lock_held_by_somebody_else_delays_but_never_stops(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    acquire, asked = filelock.FileLock.acquire, []

    def hurried(lock: filelock.FileLock, timeout: float) -> object:
        asked.append(timeout)
        return acquire(lock, timeout=0.1)

    (cache / "locks").mkdir(parents=True)
    with filelock.FileLock(cache / "locks" / f"{job(12).key()[:16]}.lock"):
        monkeypatch.setattr(filelock.FileLock, "acquire", hurried)
        assert number_of(make(job(12), timeout=600)) == 12
    assert asked == [600], "the lock's timeout is the build's own"


def test_compiling_may_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    make(job(1))
    monkeypatch.setenv("FAGEN_DISABLE_JIT", "1")
    said: list[str] = []
    make(job(1), tell=lambda: said.append("compiling"))
    problem = Problem(dtype="fp32", head_dim=72, mask="causal", heads=6, kv_heads=3, seqlen_q=5)
    with pytest.raises(BuildError) as caught:
        make(job(2, about={"problem": problem.to_dict()}), tell=lambda: said.append("compiling"))
    assert caught.value.remedy == f"build it ahead: FAGEN_DISABLE_JIT=0 {ops.build_command(problem, 'cpu')}"
    assert not said, "nothing is compiled, so nothing says so"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAGEN_CXX", str(tmp_path / "none"))
    with pytest.raises(MissingTool, match="no C\\+\\+ compiler") as caught:
        make(job())
    assert caught.value.exit_code == 4
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere\n")
    broken.chmod(0o755)
    monkeypatch.setenv("FAGEN_CXX", str(broken))
    with pytest.raises(MissingTool, match="cannot be run"):
        make(job())


# ---- processes side by side ---------------------------------------------------------------------------------------

_BUILD = """
import sys
sys.path.insert(0, {root!r})
from fagen.build import cache
from tests.build.test_cache import job, number_of, ENDLESS
artifact = cache.make(job({number}{more}))
print(artifact.path, number_of(artifact))
"""


def _start(number: int, more: str = "") -> subprocess.Popen:
    code = _BUILD.format(root=str(Path(__file__).parents[2]), number=number, more=more)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_build_the_same_kernel_once(compiler: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    rewrite(compiler, f"echo x >> {count}; sleep 1")
    racing = [_start(13) for _ in range(2)]
    results = [process.communicate(timeout=600) for process in racing]
    assert all(process.returncode == 0 for process in racing), results
    assert len({out for out, _ in results}) == 1 and results[0][0].split()[-1] == "13"
    assert count.read_text().count("x") == 1


def test_two_processes_without_locks_both_end_well(cache: Path, compiler: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    rewrite(compiler, f"echo x >> {count}; sleep 2")
    cache.mkdir()
    (cache / "locks").write_text("no folder, hence no locks")
    racing = [_start(14) for _ in range(2)]
    results = [process.communicate(timeout=600) for process in racing]
    assert all(process.returncode == 0 for process in racing), results
    assert len({out for out, _ in results}) == 1
    assert count.read_text().count("x") == 2 and no_leftovers(cache)


def test_a_killed_process_leaves_no_compiler_and_no_lock(cache: Path) -> None:
    process = _start(1, ", source=ENDLESS")
    for _ in range(2400):
        if list(cache.glob("tmp/*/build/build.ninja")):
            break
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    assert not _compilers_of(cache)
    assert not list(cache.glob("kernels/*"))
    assert number_of(make(job(15))) == 15


# ---- what ptxas says ----------------------------------------------------------------------------------------------


CUDA = """
#include <cuda_fp16.h>
__global__ void twice(half* x) { __shared__ half s[64]; s[threadIdx.x] = x[threadIdx.x]; __syncthreads();
  x[threadIdx.x] = s[63 - threadIdx.x] * half(2); }
extern "C" int number() { return 21; }
extern "C" int run(half* x) { twice<<<1, 64>>>(x); return cudaGetLastError(); }
"""


@pytest.mark.skipif(toolchain.nvcc() is None, reason="needs nvcc")
def test_a_kernel_for_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # the flags decide, whatever torch is told
    home = toolchain.cuda_home(toolchain.require_nvcc())
    flags = ("-gencode=arch=compute_80,code=sm_80", "-Xptxas", "-v")
    link = (f"-L{home}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread")
    made = make(job(source=CUDA, suffix=".cu", flags=flags, link_flags=link, arch="sm_80"))
    assert number_of(made) == 21
    assert made.facts["registers"] > 0 and made.facts["spill_bytes"] == 0 and made.facts["smem_bytes"] == 128
    assert "torch" not in subprocess.run(["ldd", made.path], capture_output=True, text=True).stdout
    log = (made.path.parent / "build.log").read_text()
    assert "sm_80" in log and "sm_90" not in log


# ---- what ptxas says ------------------------------------------------------------------------------------------------

PTXAS = """
ptxas info    : Compiling entry function '_ZN5fagen14forward_kernelE12fagen_params' for 'sm_90'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z11plan_kernelv' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers
"""


def test_ptxas_facts_are_told_of_each_kernel() -> None:
    forward = {"stack": 16, "spill_bytes": 20, "registers": 128, "smem_bytes": 1024}
    plan = {"stack": 0, "spill_bytes": 0, "registers": 168, "smem_bytes": 0}
    both = {"forward_kernel": forward, "plan_kernel": plan}
    assert parse_ptxas(PTXAS) == {**forward, "functions": both}
    assert parse_ptxas(PTXAS, "other_kernel") == {**plan, "functions": both}, "the one with the most registers"
    spilling = PTXAS.replace("Used 128", "Used 168")
    assert parse_ptxas(spilling, "other_kernel")["spill_bytes"] == 20, "of those the one that spills"
    assert parse_ptxas("nothing of the kind") == {}


@pytest.mark.parametrize(
    ("symbol", "name"),
    [("_Z11plan_kernelv", "plan_kernel"), ("_ZN5fagen4sm906kernelEv", "kernel"), ("plain", "plain"), ("_Z9", "_Z9")],
)
def test_a_mangled_name_holds_the_plain_one(symbol: str, name: str) -> None:
    assert plain_name(symbol) == name
