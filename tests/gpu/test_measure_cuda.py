"""The clock on a GPU: what the host spends on a call is not the kernel's time."""

from __future__ import annotations

import time

import torch

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
