"""DLPack by ctypes: borrowing from any producer, and lending memory of our own. Needs no framework.

Structs follow the DLPack specification (dlpack.h of DLPack 1.1).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

from ._abi import Dtype

READ_ONLY = 1


class DLTensor(ctypes.Structure):
    """What a producer lends; strides in elements, NULL = row-major."""

    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("type_code", c_uint8),
        ("type_bits", c_uint8),
        ("type_lanes", c_uint16),
        ("shape", ctypes.POINTER(c_int64)),
        ("strides", ctypes.POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("manager_ctx", c_void_p), ("deleter", c_void_p)]


class _ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", DLTensor),
    ]


def borrow(producer: Any) -> tuple[DLTensor, int, object]:
    """The producer's tensor, its flags, and the capsule to hold for as long as the tensor is used.

    The capsule is not consumed: dropping it gives the tensor back.
    """
    capsule = _capsule(producer)
    if _is_valid(capsule, _VERSIONED):
        versioned = _ManagedVersioned.from_address(_pointer(capsule, _VERSIONED))
        if versioned.major != 1:
            raise BufferError(f"DLPack {versioned.major}.{versioned.minor} is not known here")
        return versioned.tensor, int(versioned.flags), capsule
    managed = _Managed.from_address(_pointer(capsule, _PLAIN))
    return managed.tensor, 0, capsule


def dtype_of(tensor: DLTensor) -> Dtype | None:
    """Our name for the element type, if it has one."""
    return _DTYPES.get((tensor.type_code, tensor.type_bits)) if tensor.type_lanes == 1 else None


def is_bytes(tensor: DLTensor) -> bool:
    """Whether the elements are uint8, which has no name of ours."""
    return (tensor.type_code, tensor.type_bits, tensor.type_lanes) == (1, 8, 1)


def lend(address: int, shape: tuple[int, ...], dtype: Dtype, owner: object) -> object:
    """A capsule over row-major CPU memory that keeps ``owner`` alive until the consumer has let go."""
    code, bits = next(key for key, value in _DTYPES.items() if value is dtype)
    extents = (c_int64 * max(len(shape), 1))(*shape)
    managed = _Managed(deleter=ctypes.cast(_DELETER, c_void_p).value)
    managed.tensor = DLTensor(address, 1, 0, len(shape), code, bits, 1, extents, None, 0)
    key = ctypes.addressof(managed)
    _lent[key] = (managed, extents, owner)
    capsule: object = _new(key, _PLAIN, ctypes.cast(_DESTRUCTOR, c_void_p))
    return capsule


def _capsule(producer: Any) -> object:
    # On a GPU, -1 asks the producer not to synchronise: the caller's stream is ordered by the caller.
    on_device = producer.__dlpack_device__()[0] != _CPU
    stream: dict[str, Any] = {"stream": -1} if on_device else {}
    try:
        return producer.__dlpack__(max_version=(1, 0), **stream)
    except TypeError:
        # A producer from before DLPack 1.0 does not know max_version.
        return producer.__dlpack__(**stream)


def _release(managed: int) -> None:
    _lent.pop(managed, None)


def _drop_unconsumed(capsule: int) -> None:
    # A consumer renames the capsule and calls the deleter itself.
    if _is_valid_at(capsule, _PLAIN):
        _lent.pop(_pointer_at(capsule, _PLAIN), None)


_PLAIN = b"dltensor"
_VERSIONED = b"dltensor_versioned"
_CPU = 1

_DTYPES = {
    (4, 16): Dtype.BF16,
    (2, 16): Dtype.F16,
    (2, 32): Dtype.F32,
    (0, 32): Dtype.I32,
    (1, 32): Dtype.U32,
    (10, 8): Dtype.E4M3,
}

# C callbacks; they live as long as the module, as capsules may.
_DELETER = ctypes.CFUNCTYPE(None, c_void_p)(_release)
_DESTRUCTOR = ctypes.CFUNCTYPE(None, c_void_p)(_drop_unconsumed)

# Lent tensors by the address of their managed struct, with all that must outlive the loan.
_lent: dict[int, tuple[_Managed, Any, object]] = {}

_py = ctypes.pythonapi


def _prototype(name: str, restype: Any, *argtypes: Any) -> Any:
    # A prototype of our own: argtypes set on ctypes.pythonapi would be seen by every other package.
    return ctypes.PYFUNCTYPE(restype, *argtypes)((name, _py))


_is_valid = _prototype("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_pointer = _prototype("PyCapsule_GetPointer", c_void_p, ctypes.py_object, ctypes.c_char_p)
_new = _prototype("PyCapsule_New", ctypes.py_object, c_void_p, ctypes.c_char_p, c_void_p)
# A capsule that is being freed must not be counted again, so it is passed by address.
_is_valid_at = _prototype("PyCapsule_IsValid", ctypes.c_int, c_void_p, ctypes.c_char_p)
_pointer_at = _prototype("PyCapsule_GetPointer", c_void_p, c_void_p, ctypes.c_char_p)
