"""The CUDA driver API by ctypes: modules, launches, tensor maps. Memory and streams come from torch."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_*
SWIZZLE_128B = 3
PROMOTE_256B = 3


@functools.cache
def cuda() -> ctypes.CDLL:
    """The driver."""
    return ctypes.CDLL("libcuda.so.1")


def check(code: int) -> None:
    """Raises what the driver calls `code`."""
    if code:
        name = ctypes.c_char_p()
        cuda().cuGetErrorName(code, ctypes.byref(name))
        raise RuntimeError(f"driver: {name.value.decode() if name.value else code}")


def compile_cubin(source: Path, into: Path, *flags: str) -> str:
    """Compiles for sm_90a; the assembler's report. CUTLASS's headers lie in $CUTLASS_INCLUDE."""
    cutlass = os.environ["CUTLASS_INCLUDE"]
    command = ["nvcc", "-cubin", "-O3", "-std=c++17", "-DNDEBUG", "--expt-relaxed-constexpr", "-lineinfo"]
    command += ["-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", f"-I{cutlass}", *flags]
    done = subprocess.run([*command, "-o", str(into), str(source)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stderr


class Kernel:
    """A function of a cubin, with its dynamic shared memory set."""

    def __init__(self, cubin: Path, name: str, shared_bytes: int) -> None:
        torch.zeros(1, device="cuda")  # makes torch's context current
        self.module = ctypes.c_void_p()
        self.function = ctypes.c_void_p()
        self.shared_bytes = shared_bytes
        check(cuda().cuModuleLoadData(ctypes.byref(self.module), cubin.read_bytes()))
        check(cuda().cuModuleGetFunction(ctypes.byref(self.function), self.module, name.encode()))
        check(cuda().cuFuncSetAttribute(self.function, MAX_SHARED, shared_bytes))

    def launch(self, grid: tuple[int, int], block: int, args: Sequence[ctypes.Array | ctypes.Structure]) -> None:
        """On torch's current stream; `args` are ctypes values, copied by the driver."""
        stream = torch.cuda.current_stream().cuda_stream
        pointers = (ctypes.c_void_p * len(args))(*[ctypes.addressof(arg) for arg in args])
        check(
            cuda().cuLaunchKernel(
                self.function, *grid, 1, block, 1, 1, self.shared_bytes, ctypes.c_void_p(stream), pointers, None
            )
        )


def tensor_map(of: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> ctypes.Array:
    """A map from `of`'s first element on, 128-byte swizzle, zeros outside; `strides` in elements, from dimension 1."""
    rank = len(sizes)
    raw = (ctypes.c_uint8 * 192)()
    offset = -ctypes.addressof(raw) % 64
    out = (ctypes.c_uint8 * 128).from_buffer(raw, offset)
    ones = (ctypes.c_uint32 * rank)(*[1] * rank)
    check(
        cuda().cuTensorMapEncodeTiled(
            ctypes.byref(out),
            MAP_TYPES[of.dtype],
            rank,
            ctypes.c_void_p(of.data_ptr()),
            (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * (rank - 1))(*[2 * stride for stride in strides]),
            (ctypes.c_uint32 * rank)(*box),
            ones,
            0,
            SWIZZLE_128B,
            PROMOTE_256B,
            0,
        )
    )
    return out
