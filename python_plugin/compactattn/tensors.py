"""From whatever callers hold to ``compactattn_tensor``: torch, NumPy, DLPack, tagged words, lists of ints."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import _abi, _dlpack
from ._abi import DeviceKind, Dtype
from .arrays import ITEM_BYTES, TYPESTR, Array
from .errors import E_DEVICE, E_DTYPE, E_NULL, E_SHAPE, E_VALUE, InvalidArgument, invalid


@dataclass(frozen=True)
class Bf16:
    """A uint16 NumPy array whose words are bf16 numbers."""

    words: Any


def bf16(words: Any) -> Bf16:
    """Tags a uint16 array as bf16, which NumPy has no type for (``ml_dtypes.bfloat16`` needs no tag)."""
    return Bf16(words)


@dataclass(frozen=True)
class E4m3:
    """A tensor of uint8, NumPy's or a DLPack producer's, whose bytes are e4m3 numbers."""

    bytes: Any


def e4m3(codes: Any) -> E4m3:
    """Tags a uint8 tensor as e4m3, as engines store fp8 caches (``torch.float8_e4m3fn`` needs no tag)."""
    return E4m3(codes)


class View(NamedTuple):
    """A tensor as the library sees it, and what must stay alive while it looks."""

    tensor: _abi.Tensor
    dtype: Dtype
    owner: object
    # Extents.
    shape: tuple[int, ...]


def view(name: str, value: Any, *, writable: bool = False) -> View:
    """Looks at ``value`` without copying it (lists of ints are copied).

    Extents, strides and alignment are the library's to judge. Raises InvalidArgument naming ``name`` for a type,
    dtype or device the library has no word for, and for read-only memory where ``writable`` is asked for.
    """
    if type(value) in _torch_kinds or _is_torch(type(value)):
        seen = _of_torch(value)
        if seen is not None:
            return seen
    if isinstance(value, Bf16):
        return _of_interface(name, value.words, writable, tag=Dtype.BF16)
    if isinstance(value, E4m3):
        return _of_codes(name, value.bytes, writable)
    if hasattr(value, "__array_interface__"):
        tag = value.dtype if isinstance(value, Array) else _extension_dtype(value)
        return _of_interface(name, value, writable, tag=tag)
    if hasattr(value, "__dlpack__"):
        return _of_dlpack(name, value, writable)
    if isinstance(value, (list, tuple)) and not writable:
        return _of_ints(name, value)
    if value is None:
        raise invalid(E_NULL, name, "a tensor", "None")
    raise invalid(E_VALUE, name, "a NumPy array, a DLPack producer or a list of ints", type(value).__name__)


def none() -> _abi.Tensor:
    """The optional tensor that was left out."""
    return _abi.Tensor()


def _of_interface(name: str, value: Any, writable: bool, tag: Dtype | None) -> View:
    interface = value.__array_interface__
    typestr, (address, read_only) = interface["typestr"], interface["data"]
    dtype = _dtype_of(name, typestr, tag)
    if writable and read_only:
        raise _read_only(name)
    shape, size = interface["shape"], ITEM_BYTES[dtype]
    strides = interface.get("strides") or _row_major(shape, size)
    if any(stride % size for stride in strides):
        raise invalid(E_VALUE, f"{name}.strides", f"multiples of {size} bytes", strides)
    elements = tuple(stride // size for stride in strides)
    return View(_tensor(name, address, (shape, elements), dtype), dtype, value, shape)


def _is_torch(kind: type) -> bool:
    # Subclasses may keep their elements elsewhere than in memory of their own.
    if kind.__module__.partition(".")[0] != "torch" or kind.__name__ not in ("Tensor", "Parameter"):
        return False
    _torch_kinds.add(kind)
    return True


def _of_torch(value: Any) -> View | None:
    """A plain torch tensor asked attribute by attribute, as a capsule costs many times that; None: ask DLPack.

    All of our types are writable memory. What torch would refuse to lend is left to DLPack to refuse.
    """
    try:
        if value.requires_grad:
            return None
        if value.is_cuda:
            kind, ordinal = DeviceKind.CUDA, value.get_device()
        elif value.is_cpu:
            kind, ordinal = DeviceKind.CPU, 0
        else:
            return None
        dtype = _torch_dtypes.get(value.dtype) or _torch_dtype(value.dtype)
        shape, strides = value.shape, value.stride()
        if dtype is None or not shape:
            return None
        pad = _PADDING[len(shape)]
        place = len(shape), kind, ordinal
        packed = _TENSOR(value.data_ptr(), *shape, *pad, *strides, *pad, 0, dtype, *place)
    except (RuntimeError, IndexError):
        # No memory, no strides, or more dimensions than four.
        return None
    return View(_abi.Tensor.from_buffer_copy(packed), dtype, value, shape)


def _torch_dtype(theirs: Any) -> Dtype | None:
    # "torch.bfloat16".
    found = _TORCH_DTYPES.get(str(theirs).rpartition(".")[2])
    if found is not None:
        _torch_dtypes[theirs] = found
    return found


def _of_dlpack(name: str, value: Any, writable: bool, tag: Dtype | None = None) -> View:
    try:
        lent, flags, capsule = _dlpack.borrow(value)
    except (BufferError, RuntimeError) as error:
        # A tensor that needs a gradient or a conjugation refuses to be lent.
        raise invalid(E_VALUE, name, "a tensor that DLPack can lend", error) from error
    dtype = tag if tag and _dlpack.is_bytes(lent) else _dlpack.dtype_of(lent)
    if dtype is None or (tag and dtype is not tag):
        got = f"DLPack type {lent.type_code} of {lent.type_bits} bits"
        raise invalid(E_DTYPE, f"{name}.dtype", "uint8" if tag else _WANTED_DTYPES, got)
    if writable and flags & _dlpack.READ_ONLY:
        raise _read_only(name)
    kind = _DEVICES.get(lent.device_type)
    if kind is None:
        raise invalid(E_DEVICE, f"{name}.device", "CPU or CUDA memory", f"DLPack device {lent.device_type}")
    shape = tuple(lent.shape[: lent.ndim])
    strides = tuple(lent.strides[: lent.ndim]) if lent.strides else _row_major(shape, 1)
    tensor = _tensor(name, (lent.data or 0) + lent.byte_offset, (shape, strides), dtype)
    tensor.device_kind, tensor.device_ordinal = kind, lent.device_id if kind is DeviceKind.CUDA else 0
    return View(tensor, dtype, (value, capsule), shape)


def _of_codes(name: str, value: Any, writable: bool) -> View:
    if hasattr(value, "__array_interface__"):
        return _of_interface(name, value, writable, tag=Dtype.E4M3)
    if not hasattr(value, "__dlpack__"):
        raise invalid(E_VALUE, name, "a NumPy array or a DLPack producer of uint8", type(value).__name__)
    return _of_dlpack(name, value, writable, tag=Dtype.E4M3)


def _of_ints(name: str, rows: Any) -> View:
    nested = bool(rows) and isinstance(rows[0], (list, tuple))
    if nested and any(len(row) != len(rows[0]) for row in rows):
        raise invalid(E_SHAPE, name, f"rows of {len(rows[0])} entries, as the first", "a row of another length")
    shape = (len(rows), len(rows[0])) if nested else (len(rows),)
    flat = [x for row in rows for x in row] if nested else rows
    try:
        array = Array.of_ints(flat, shape)
    except (TypeError, OverflowError) as error:
        raise invalid(E_VALUE, name, "int32 numbers", error) from error
    return _of_interface(name, array, False, tag=array.dtype)


def _tensor(name: str, address: int, layout: tuple[tuple[int, ...], tuple[int, ...]], dtype: Dtype) -> _abi.Tensor:
    shape, strides = layout
    ndim = len(shape)
    if not 1 <= ndim <= 4:
        raise invalid(E_SHAPE, f"{name}.ndim", "1 to 4 dimensions", ndim)
    tensor = _abi.Tensor(data=address or None, dtype=dtype, ndim=ndim, device_kind=DeviceKind.CPU)
    tensor.shape[:ndim] = shape
    tensor.stride[:ndim] = strides
    return tensor


def _dtype_of(name: str, typestr: str, tag: Dtype | None) -> Dtype:
    if tag is Dtype.BF16 and typestr[1:] in ("u2", "V2"):
        return Dtype.BF16
    if tag is Dtype.E4M3:
        if typestr[1:] not in ("u1", "V1", "f1"):
            raise invalid(E_DTYPE, f"{name}.dtype", "uint8, to be read as e4m3", typestr)
        return Dtype.E4M3
    found = {text: dtype for dtype, text in TYPESTR.items()}.get(typestr)
    if tag is Dtype.BF16:
        raise invalid(E_DTYPE, f"{name}.dtype", "uint16 words, to be read as bf16", typestr)
    if found is Dtype.BF16:
        raise invalid(E_DTYPE, f"{name}.dtype", f"{_WANTED_DTYPES}; tag bf16 words by compactattn.bf16", "uint16")
    if found is Dtype.E4M3:
        raise invalid(E_DTYPE, f"{name}.dtype", f"{_WANTED_DTYPES}; tag e4m3 bytes by compactattn.e4m3", "uint8")
    if found is None:
        raise invalid(E_DTYPE, f"{name}.dtype", _WANTED_DTYPES, typestr)
    return found


def _extension_dtype(value: Any) -> Dtype | None:
    # ml_dtypes registers both with NumPy; their type strings are those of any record of that size.
    named = {"bfloat16": Dtype.BF16, "float8_e4m3fn": Dtype.E4M3}
    return named.get(getattr(value.dtype, "name", ""))


def _row_major(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    strides = []
    for extent in reversed(shape):
        strides.append(size)
        size *= max(extent, 1)
    return tuple(reversed(strides))


def _read_only(name: str) -> InvalidArgument:
    return invalid(E_VALUE, name, "writable memory", "a read-only tensor")


# DLPack: CPU, CUDA, pinned host memory, CUDA managed memory.
_DEVICES = {1: DeviceKind.CPU, 2: DeviceKind.CUDA, 3: DeviceKind.CPU, 13: DeviceKind.CUDA}
# torch's classes and dtypes met so far: nothing is imported to know them.
_torch_kinds: set[type] = set()
_torch_dtypes: dict[Any, Dtype] = {}
_TORCH_DTYPES = {
    "bfloat16": Dtype.BF16,
    "float16": Dtype.F16,
    "float32": Dtype.F32,
    "int32": Dtype.I32,
    "uint32": Dtype.U32,
    "float8_e4m3fn": Dtype.E4M3,
}
# As _abi.Tensor: data, shape, stride, storage_bytes, dtype, ndim, device_kind, device_ordinal.
_TENSOR = struct.Struct("=Q4q4qq4i").pack
_PADDING = [(0,) * (4 - ndim) for ndim in range(5)]
_WANTED_DTYPES = "bf16, f16, f32, i32, u32 or e4m3"
