"""Adds the family of CONTRIBUTING to a copy of fagen, asks what dispatch makes of it, and runs one of its kernels.

The template and the family's module stand beside this file. They are what CONTRIBUTING shows, byte for byte.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROBLEM = "--target cpu --dtype fp32 --head-dim 24-40 --mask causal --seqlen-q 37 --seqlen-k 53 --heads 4 --kv-heads 2"


def main(folder: Path) -> None:
    for name in ("fagen", "templates", "tuning_db"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "plain.cpp.j2", folder / "templates" / "cpu")
    shutil.copy(HERE / "plain_forward.py", folder / "fagen" / "families")

    registry = folder / "fagen" / "families" / "__init__.py"
    text = registry.read_text()
    changed = text.replace("        cpu_backward,\n", "        cpu_backward,\n        plain_forward,\n").replace(
        "forward = (", "forward = (plain_forward.FAMILY, ", 1
    )
    assert changed.count("plain_forward") == 2, "the registry has changed: see all_families"
    registry.write_text(changed)

    def fagen(*words: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        subprocess.run([sys.executable, "-m", "fagen", *words], cwd=folder, env=environment, check=True)

    fagen("explain", *PROBLEM.split())
    fagen("emit", *PROBLEM.split(), "--family", "plain_forward", "--out", "plain", "--build", "--example")
    subprocess.run([folder / "plain" / "example"], check=True)  # says that it is right, or fails


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
