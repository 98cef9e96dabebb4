"""Whose memory a long run judges: the verdict of tests/gpu/ranks.py, and the driver that counts the library's."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parents[1] / "gpu"
MIB = 1 << 20


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(GPU))
    import ranks_report

    return ranks_report


def levels(**leaks: int) -> list[dict[str, Any]]:
    """Ten minutes, a sample each ten seconds: everything warms up for two of them; what is named grows each time."""
    found = []
    for i in range(61):
        at = {"device_used": 9000 * MIB, "reserved": 8000 * MIB, "held": 4 * MIB, "resident": 900 * MIB, "files": 40}
        warmth = min(i, 12) * 8 * MIB
        at |= {name: at[name] + warmth for name in ("device_used", "reserved", "resident")}
        at |= {name: at[name] + i * by for name, by in leaks.items()}
        found.append({"second": 10.0 * i} | at)
    return found


@pytest.mark.parametrize(
    ("shared", "leaks", "said"),
    [
        # Warming up is no growth.
        ([], {}, []),
        # What others take of a shared GPU is not this process's, and nobody's excuse where it is not shared.
        ([0, 1], {"device_used": MIB}, []),
        ([0], {"device_used": MIB}, ["rank 1: device memory grows"]),
        ([], {"device_used": MIB}, ["rank 0: device memory grows", "rank 1: device memory grows"]),
        # Its own is judged everywhere: torch's, the library's, a plan's counters at least.
        ([0, 1], {"reserved": 2 * MIB}, ["rank 0: device memory grows", "rank 1: device memory grows"]),
        ([0, 1], {"held": 64}, ["rank 0: device memory grows", "rank 1: device memory grows"]),
        ([0, 1], {"files": 1}, ["rank 0: 34 more files", "rank 1: 34 more files"]),
        ([0, 1], {"resident": MIB // 2}, ["host memory grows"]),
    ],
)
def test_a_leak_is_found_where_others_are_too(
    report: Any, shared: list[int], leaks: dict[str, int], said: list[str]
) -> None:
    given = argparse.Namespace(steps=1, shared=shared)
    faults = report.verdict(given, [{"levels": levels(**leaks)} for _ in range(2)])
    assert bool(faults) == bool(said), faults
    for text in said:
        assert any(text in fault for fault in faults), faults


COUNTED = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[2])
from ranks_memory import held
one, other = (ctypes.CDLL(path) for path in (os.environ["COMPACTATTN_LIBCUDA"], sys.argv[1]))
# The stand-in forwards to a copy of itself, which is the fake GPU.
other.fake_set_mode(b"")
other.fake_bytes.restype = ctypes.c_size_t
context, host = ctypes.c_void_p(), ctypes.c_void_p()
one.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
one.cuCtxPushCurrent_v2(context)
seen = [held()]
device = [ctypes.c_uint64() for _ in range(2)]
for address, size in zip(device, (1000, 24)):
    assert one.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0
    seen.append(held())
assert one.cuMemHostAlloc(ctypes.byref(host), ctypes.c_size_t(512), 3) == 0
seen.append(held())
assert held() == other.fake_bytes()
# What fails changes nothing.
other.fake_set_mode(b"oom_on_alloc")
assert one.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(8)) == 2
assert one.cuMemFree_v2(ctypes.c_uint64(12345)) != 0
other.fake_fail(b"cuMemFree_v2:1:1")
assert one.cuMemFree_v2(device[0]) == 1
seen.append(held())
one.cuMemFree_v2(device[0])
seen.append(held())
one.cuMemFree_v2(device[1])
one.cuMemFreeHost(host)
seen.append(held())
print(seen)
"""


# A driver that gives an address to somebody else before the call that frees it has returned.
HASTY = """
#include <stddef.h>
#include <stdint.h>
static uint64_t next = 4096;
int (*somebody)(uint64_t* out, size_t bytes);
int cuMemAlloc_v2(uint64_t* out, size_t bytes) {
  *out = next;
  next += bytes;
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  uint64_t again;
  next = address;
  return somebody ? somebody(&again, 24) : 0;
}
"""
MEETS = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[2])
from ranks_memory import held
one, other = (ctypes.CDLL(path) for path in (os.environ["COMPACTATTN_LIBCUDA"], sys.argv[1]))
device = [ctypes.c_uint64() for _ in range(2)]
for address, size in zip(device, (512, 1000)):
    assert one.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0
# A place before the one that is freed next: the other's lies there.
one.cuMemFree_v2(device[0])
ctypes.c_void_p.in_dll(other, "somebody").value = ctypes.cast(one.cuMemAlloc_v2, ctypes.c_void_p).value
seen = [held()]
one.cuMemFree_v2(device[1])
print([*seen, held()])
"""


def built(library: Path, source: Path) -> Path:
    line = ["cc", "-O1", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source), "-ldl"]
    subprocess.run(line, check=True)
    return library


def printed(code: str, one: Path, other: Path) -> str:
    environment = {"FAKE_CUDA": "forward", "FAKE_CUDA_REAL": str(other), "COMPACTATTN_LIBCUDA": str(one)}
    line = [sys.executable, "-c", code, str(other), str(GPU)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_driver_counts_bytes_that_pass_through_it(tmp_path: Path) -> None:
    one, other = (built(tmp_path / name, GPU / "counting_driver.c") for name in ("one.so", "other.so"))
    assert printed(COUNTED, one, other) == "[0, 1000, 1024, 1536, 1536, 536, 0]\n"


def test_an_address_that_somebody_has_again_at_once_stays_counted(tmp_path: Path) -> None:
    (tmp_path / "hasty.c").write_text(HASTY)
    one, other = (
        built(tmp_path / "one.so", GPU / "counting_driver.c"),
        built(tmp_path / "hasty.so", tmp_path / "hasty.c"),
    )
    assert printed(MEETS, one, other) == "[1000, 24]\n"


def test_without_that_driver_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    monkeypatch.delenv("COMPACTATTN_LIBCUDA", raising=False)
    from ranks_memory import held

    assert held() is None
