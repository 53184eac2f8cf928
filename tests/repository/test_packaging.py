"""The wheel holds all it needs, and works outside the checkout in an environment of its own."""

from __future__ import annotations

import email
import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="no hatchling to build the wheel with (pip install hatchling)")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with the wheel, and this environment's other packages behind it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    script = folder / "bin" / "fagen"
    script.write_text(f"#!{folder}/bin/python\nimport sys\nfrom fagen.cli.main import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return folder / "bin"


@pytest.fixture
def run(installed, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    # the cache is that of all tests: what the wheel's files make is found there if they are the checkout's
    environment |= {"FAGEN_DB_DIR": str(tmp_path / "db")}

    def go(*words: str):
        return subprocess.run(
            [installed / words[0], *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return go


def test_the_wheel_is_pure_python_with_data_inside(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for source, inside in (("fagen", "fagen"), ("templates", "fagen/templates"), ("tuning_db", "fagen/tuning_db")):
        files = [p.relative_to(ROOT / source) for p in (ROOT / source).rglob("*") if p.is_file()]
        wanted = {f"{inside}/{path}" for path in files if "__pycache__" not in path.parts}
        assert wanted <= names, sorted(wanted - names)[:5]
    assert not any(name.startswith(("tests", "generated", "docs")) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata(wheel):
    import fagen

    archive = zipfile.ZipFile(wheel)
    text = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert f"Version: {fagen.__version__}" in text["METADATA"]
    assert "fagen = fagen.cli.main:main" in text["entry_points.txt"]
    for package in ("torch", "jinja2", "ninja", "optuna", "filelock", "platformdirs", "rich"):
        assert f"Requires-Dist: {package}" in text["METADATA"]


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_string(archive.read(name).decode())


def links(text: str) -> list[str]:
    """Where a Markdown document leads, pictures among them, as a renderer finds them."""
    from markdown_it import MarkdownIt

    tokens = [
        t for block in MarkdownIt("commonmark").enable("table").parse(text) for t in (block, *(block.children or ()))
    ]
    found = [t.attrs.get("href") or t.attrs.get("src") for t in tokens if t.type in ("link_open", "image")]
    inside = [
        word for t in tokens if t.type.startswith("html") for word in re.findall(r'(?:src|href)="([^"]*)"', t.content)
    ]
    return [str(link) for link in [*found, *inside] if link]


def test_the_readme_of_the_wheel_has_no_relative_link(metadata):
    """It stands alone on the page of an index. All it links to is in the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    repository = project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]
    text = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    here, there = links((ROOT / "README.md").read_text()), links(text)
    assert len(here) == len(there) > 20
    assert any(link.endswith(".svg") for link in there)
    for link, was in zip(there, here, strict=True):
        assert link.startswith("https://"), link
        if was.startswith("https://"):
            assert link == was
            continue
        kind = "raw" if was.endswith((".svg", ".png")) else "blob"
        assert link == f"{repository}/{kind}/HEAD/{was}"
        assert (ROOT / was.partition("#")[0]).exists(), was


def test_an_sdist_has_what_a_wheel_is_built_from(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"hatch_build.py", "README.md", "LICENSE", "pyproject.toml", "fagen/py.typed"} <= names
    assert any(name.startswith("templates/") for name in names)


def test_code_and_absolute_links_of_a_readme_stay():
    absolute = runpy.run_path(str(ROOT / "hatch_build.py"))["absolute"]
    stays = "[a](https://a.b/c) [d](#e) [f](mailto:g@h.i)\n\n```cpp\n[&](int) ![j](k.png)\n```\n"
    assert absolute(stays, "R") == stays
    assert absolute("[a [b]](c.md#d) ![e](f.svg)", "R") == "[a [b]](R/blob/HEAD/c.md#d) ![e](R/raw/HEAD/f.svg)"
    assert absolute("[![a](b.svg)](c.md)", "R") == "[![a](R/raw/HEAD/b.svg)](R/blob/HEAD/c.md)"


def test_urls_and_classifiers(metadata):
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))
    assert urls.keys() == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    others = [
        p for p in ROOT.rglob("*") if p.suffix in (".md", ".py", ".toml", ".yml") and p.parts[len(ROOT.parts)][0] != "."
    ]
    naming = [p.relative_to(ROOT).as_posix() for p in others if urls["Repository"] in p.read_text(errors="replace")]
    assert naming == ["pyproject.toml"], "the repository is named in one place"


def test_it_is_the_installed_one_and_it_finds_its_data(run, installed):
    done = run(
        "python", "-c", "import fagen.env as e; print(e.__file__, e.data_dir('templates'), e.data_dir('tuning_db'))"
    )
    paths = done.stdout.split()
    assert len(paths) == 3, done.stderr
    assert all(path.startswith(str(installed.parent)) for path in paths)


def test_help(run):
    done = run("fagen", "--help")
    assert done.returncode == 0, done.stderr
    assert "emit" in done.stdout


def test_emit_from_another_folder(run, tmp_path):
    words = "--target sm_80 --head-dim 64 --dtype bf16 --mask causal --out out --example --json"
    done = run("fagen", "emit", *words.split())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["family"] == "sm80_forward"
    assert (tmp_path / "out" / "kernel.cu").is_file()


def test_explain_and_build(run):
    words = "--target cpu --dtype fp32 --head-dim 32 --mask causal --seqlen 64 --json".split()
    done = run("fagen", "explain", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["family"] == "cpu_forward"


def test_the_op_works_installed(run):
    program = (
        "import torch, fagen\n"
        "q = torch.randn(1, 40, 2, 32)\n"
        "out = fagen.attention(q, q, q, causal=True)\n"
        "t = q.transpose(1, 2)\n"
        "want = torch.nn.functional.scaled_dot_product_attention(t, t, t, is_causal=True).transpose(1, 2)\n"
        "print(float((out - want).abs().max()))"
    )
    done = run("python", "-c", program)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_what_needs_a_checkout_says_so(run):
    for words in ((), ("verify",)):
        done = run("python", "-m", "fagen.cli.generated", *words)
        assert done.returncode == 4
        assert "checkout" in done.stderr and len(done.stderr.splitlines()) == 3
