"""The driver's library, played by one of ours: the road through ctypes is the real one."""

from __future__ import annotations

import os
import subprocess

import pytest

from fagen.build import toolchain
from fagen.timing import nvml

_SOURCE = r"""
#include <cstdlib>
#include <cstring>
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByUUID(const char* uuid, void** handle) {
  if (strcmp(uuid, "GPU-12ab")) return 6;
  *handle = (void*)0x7f00000000002aULL;  // needs all of its bits
  return 0;
}
static int give(void* handle, unsigned value, unsigned* out) {
  if (handle != (void*)0x7f00000000002aULL) return 2;
  *out = value;
  return 0;
}
int nvmlDeviceGetClockInfo(void* h, int kind, unsigned* out) { return give(h, kind == 1 ? 1755 : 3201, out); }
int nvmlDeviceGetMaxClockInfo(void* h, int kind, unsigned* out) { return give(h, kind == 1 ? 1980 : 0, out); }
int nvmlDeviceGetPowerUsage(void* h, unsigned* out) { return give(h, 653251, out); }
int nvmlDeviceGetTemperature(void* h, int sensor, unsigned* out) { return sensor ? 2 : give(h, 61, out); }
int nvmlDeviceGetEnforcedPowerLimit(void*, unsigned*) { return 3; }  // not supported here
struct Process { unsigned pid; unsigned long long used; unsigned gpu, compute; };
int nvmlDeviceGetComputeRunningProcesses_v3(void* h, unsigned* count, Process* rows) {
  unsigned own = atoi(getenv("FAKE_OWN")), room = *count;
  if (int status = give(h, 3, count)) return status;
  if (room < 3) return 7;
  rows[0] = {own, 1, 0, 0};
  rows[1] = {77, 1ULL << 40, 0, 0};
  rows[2] = {78, 2, 0xffffffff, 0xffffffff};
  return 0;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void* h, unsigned long long* out) {
  unsigned low = 0;
  int status = give(h, atoi(getenv("FAKE_REASONS")), &low);
  *out = 0x8000000000000000ULL | low;
  return status;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.cpp").write_text(_SOURCE)
    command = [str(toolchain.require_cxx()), "-shared", "-fPIC", "-o", "libnvml.so", "nvml.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "libnvml.so"


@pytest.fixture(autouse=True)
def _look_anew():
    nvml._find.cache_clear()
    yield
    nvml._find.cache_clear()


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_what_the_library_tells(library, monkeypatch):
    monkeypatch.setattr(nvml, "LIBRARY", str(library))
    monkeypatch.setenv("FAKE_REASONS", str(0x1 | 0x4 | 0x40))
    facts = {"clock_mhz": 1755, "clock_max_mhz": 1980, "memory_mhz": 3201, "power_w": 653.3, "temp_c": 61}
    facts["throttle"] = ["power_cap", "hw_thermal"]
    assert nvml.read("12ab") == nvml.read("GPU-12ab") == facts
    assert nvml.SPOILING.intersection(facts["throttle"]) == {"hw_thermal"}
    monkeypatch.setenv("FAKE_REASONS", "1")
    assert nvml.read("12ab")["throttle"] == []
    assert nvml.read("GPU-other") == {}


@pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")
def test_other_processes_are_counted(library, monkeypatch):
    monkeypatch.setattr(nvml, "LIBRARY", str(library))
    monkeypatch.setattr(nvml, "_uuid", lambda index: ("12ab", "other", "")[index])
    monkeypatch.setenv("FAKE_OWN", str(os.getpid()))
    assert [nvml.others(index) for index in range(3)] == [2, 0, 0]
    monkeypatch.setenv("FAKE_OWN", "1")
    assert nvml.others(0) == 3
    monkeypatch.setattr(nvml, "_MOST_PROCESSES", 2)
    assert nvml.others(0) == 0, "more than there is room for are not told"


def test_without_the_library_there_are_no_facts(monkeypatch):
    monkeypatch.setattr(nvml, "LIBRARY", "libthere-is-none.so.1")
    assert nvml.read("12ab") == {}


def test_a_library_that_knows_little(tmp_path, monkeypatch):
    """Of the C library no function has the names."""
    monkeypatch.setattr(nvml, "LIBRARY", None)  # this process itself
    assert nvml.read("12ab") == {}


def test_nothing_but_readings_is_asked_for():
    asked = [function for function, _, _ in nvml._READINGS.values()]
    assert all(function.startswith("nvmlDeviceGet") for function in asked)
