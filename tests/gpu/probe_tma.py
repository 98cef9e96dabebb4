"""Prints bytes a clock and SM of box copies: sizes, layouts, issuing warps; shared streams and an L2-resident pool."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path

import torch
from driver import ROOT, Kernel, compile_cubin, tensor_map

HEADS, DIM, TILES = 8, 128, 1024


class ProbeParams(ctypes.Structure):
    """As in probe_tma.cu."""

    _fields_ = [("pages", ctypes.c_uint64), ("clocks", ctypes.c_uint64)] + [
        (name, ctypes.c_int32) for name in ("tiles", "rows", "issuers", "streams", "heads", "reserved")
    ]


def run(kernel: Kernel, rows: int, issuers: int, layout: str, streams: int, pool_mb: int) -> tuple[float, float]:
    """Bytes a clock and SM, and TB/s over the chip, median of 5."""
    num_pages = pool_mb * 2**20 // (rows * HEADS * DIM * 2)
    pool = torch.randn(num_pages * rows * HEADS * DIM // 2, device="cuda").view(torch.bfloat16)
    page, token, head = (
        (rows * HEADS * DIM, HEADS * DIM, DIM) if layout == "NHD" else (rows * HEADS * DIM, DIM, rows * DIM)
    )
    sizes, strides = (64, rows, 2, HEADS, num_pages), (token, 64, head, page)
    kv_map = tensor_map(pool, sizes, strides, (64, rows, 1, 1, 1))
    pages = torch.randint(0, num_pages, (streams, TILES, 128 // rows), device="cuda", dtype=torch.int32)
    clocks = torch.zeros(132, device="cuda", dtype=torch.int64)
    params = ProbeParams(pages.data_ptr(), clocks.data_ptr(), TILES, rows, issuers, streams, HEADS, 0)
    rates = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        kernel.launch((132, 1), 128, [kv_map, params])
        end.record()
        torch.cuda.synchronize()
        per_clock = TILES * 32768 / clocks.double().mean().item()
        rates.append((per_clock, 132 * TILES * 32768 / start.elapsed_time(end) / 1e9))
    return sorted(rates[1:])[2]


def main() -> None:
    """Prints one line a case."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "probe.cubin"
        compile_cubin(ROOT / "tests/gpu/probe_tma.cu", cubin)
        kernel = Kernel(cubin, "probe_tma", 6 * 32768 + 256)
        print("box_KB issuers layout streams pool_MB  B/clk/SM  TB/s")
        cases = [(4, 2048), (132, 24)]
        for rows in (16, 32, 64, 128):
            for issuers in (1, 2):
                for layout in ("NHD", "HND"):
                    for streams, pool in cases:
                        per_clock, rate = run(kernel, rows, issuers, layout, streams, pool)
                        what = f"{rows // 8:6d} {issuers:7d} {layout:6s} {streams:7d} {pool:7d}"
                        print(f"{what} {per_clock:9.1f} {rate:5.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.zeros(1, device="cuda")
    main()
