"""Memory of the package's own: stage results and workspaces, readable by NumPy and by DLPack consumers."""

from __future__ import annotations

import ctypes
import math
import mmap
import struct
import sys
from typing import Any

from . import _dlpack
from ._abi import Dtype


class Memory:
    """Zeroed CPU memory, aligned to a system page; pages never touched cost nothing."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._map = mmap.mmap(-1, max(num_bytes, 1))
        self._pin = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(self._pin)

    def view(self) -> memoryview:
        """The bytes."""
        return memoryview(self._map)[: self.num_bytes]


class Array:
    """A row-major CPU tensor; ``numpy.asarray`` and ``torch.from_dlpack`` share its memory."""

    def __init__(self, shape: tuple[int, ...], dtype: Dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self._memory = Memory(math.prod(shape) * ITEM_BYTES[dtype])
        self.address = self._memory.address

    @classmethod
    def of_ints(cls, values: Any, shape: tuple[int, ...]) -> Array:
        """An int32 array of ``values`` (flat); OverflowError for one that does not fit."""
        array = cls(shape, Dtype.I32)
        flat = array._memory.view().cast("i")
        for i, value in enumerate(values):
            try:
                flat[i] = value
            except ValueError:
                raise OverflowError(f"{value} is no int32") from None
        return array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": TYPESTR[self.dtype],
            "data": (self.address, False),
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        if dl_device not in (None, (1, 0)) or copy or stream is not None:
            raise BufferError("only the CPU memory itself is offered")
        return _dlpack.lend(self.address, self.shape, self.dtype, self)

    def __len__(self) -> int:
        return self.shape[0]

    def head(self, rows: int) -> Array:
        """The first ``rows`` rows, in the same memory."""
        part = Array.__new__(Array)
        part.shape, part.dtype = (rows, *self.shape[1:]), self.dtype
        part._memory, part.address = self._memory, self.address
        return part

    def numpy(self) -> Any:
        """A NumPy view of the same memory; bf16 comes as uint16 words."""
        import numpy

        return numpy.asarray(self)

    def tolist(self) -> Any:
        """Nested lists; bf16 comes as integers."""
        used = self._memory.view()[: self.size * ITEM_BYTES[self.dtype]]
        flat = list(struct.unpack(f"{self.size}{_FORMAT[self.dtype]}", used))
        for extent in reversed(self.shape[1:]):
            flat = [flat[i : i + extent] for i in range(0, len(flat), extent)] if extent else []
        return flat

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def like(self, other: Any) -> Any:
        """The same memory as the kind of tensor ``other`` is: NumPy's, torch's, or this."""
        home = type(other).__module__.partition(".")[0]
        if home == "torch":
            return sys.modules["torch"].from_dlpack(self)
        if home != "numpy":
            return self
        array = sys.modules["numpy"].asarray(self)
        return array.view(other.dtype) if self.dtype is Dtype.BF16 else array


ITEM_BYTES = {Dtype.BF16: 2, Dtype.F16: 2, Dtype.F32: 4, Dtype.I32: 4, Dtype.U32: 4, Dtype.E4M3: 1}

# NumPy has no bf16 and no e4m3 of its own; their words travel as unsigned integers.
TYPESTR = {
    Dtype.BF16: "<u2",
    Dtype.F16: "<f2",
    Dtype.F32: "<f4",
    Dtype.I32: "<i4",
    Dtype.U32: "<u4",
    Dtype.E4M3: "|u1",
}

_FORMAT = {Dtype.BF16: "H", Dtype.F16: "e", Dtype.F32: "f", Dtype.I32: "i", Dtype.U32: "I"}
