"""The clock on a GPU: what the host spends on a call is not the kernel's time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from fagen.cli import main
from fagen.timing import timer

HOST_SECONDS = 2e-4


def test_the_hosts_time_does_not_count() -> None:
    x = torch.zeros(16, device="cuda")

    def call() -> None:
        time.sleep(HOST_SECONDS)
        x.add_(1)

    call()  # the first call of a process loads kernels, and lasts long enough not to be captured
    torch.cuda.synchronize()
    assert timer.time_once(call, device="cuda") < HOST_SECONDS / 4
    assert timer.time_calls({"it": call}, device="cuda", rounds=3)["it"].median < HOST_SECONDS / 4


def test_a_step_of_training_is_timed_eagerly_and_its_memory_is_told(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    words = (
        "--op training --head-dim 64 --mask causal --seqlen 1k --heads 4 --peers sdpa,plain --rounds 3 --min-time 0.02"
    )
    assert main.main(["bench", *words.split(), "--deterministic", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    gradients = 3 * 1024 * 4 * 64 * 2
    for name, facts in row["participants"].items():
        assert facts["outcome"] == "ok" and "not_captured" not in facts, name
        assert gradients <= facts["peak_bytes"] < 64 * gradients, name
    assert row["of_plain"] > 0 and row["best_peer"] == "sdpa"
