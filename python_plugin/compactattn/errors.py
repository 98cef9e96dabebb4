"""One exception per kind of trouble; each carries the library's status code and name."""

from __future__ import annotations


class CompactAttnError(Exception):
    """A call that did not do what it says.

    ``status`` is the library's code (a ``compactattn_status``), ``name`` its stable name such as ``E_SHAPE``. The text
    names the argument, what was wanted and what came; it never holds addresses or tensor contents.
    """

    def __init__(self, status: int, name: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.name = name

    def __reduce__(self) -> tuple[type[CompactAttnError], tuple[int, str, str]]:
        return type(self), (self.status, self.name, str(self))


class InvalidArgument(CompactAttnError, ValueError):
    """The caller's mistake (codes 1 to 99), found before anything ran: no output was written."""


class Unsupported(InvalidArgument):
    """Well formed, but not offered (``E_UNSUPPORTED``); the text says what is."""


class DeviceError(CompactAttnError):
    """Driver or device (codes 100 to 199)."""


class OutOfMemory(DeviceError, MemoryError):
    """Memory ran out (``E_OUT_OF_MEMORY``)."""


class InternalError(CompactAttnError):
    """A fault of the library (codes from 200)."""


class LibraryError(CompactAttnError):
    """The native library is missing, or not the one this package was written for."""


# Codes that this package gives by itself, before the library is asked.
E_NULL, E_ABI, E_SHAPE, E_VALUE, E_DTYPE, E_DEVICE, E_STREAM, E_IO = 1, 5, 6, 7, 9, 13, 21, 23

_NAMES = {
    E_NULL: "E_NULL",
    E_ABI: "E_ABI",
    E_SHAPE: "E_SHAPE",
    E_VALUE: "E_VALUE",
    E_DTYPE: "E_DTYPE",
    E_DEVICE: "E_DEVICE",
    E_STREAM: "E_STREAM",
    E_IO: "E_IO",
}


def invalid(status: int, argument: str, wanted: str, got: object) -> InvalidArgument:
    """An error about ``argument``, in the library's own form."""
    name = _NAMES[status]
    return InvalidArgument(status, name, f"{name}: {argument}: wanted {wanted}, got {got}")


def of_status(status: int, name: str, text: str) -> CompactAttnError:
    """The exception for a status that is not OK."""
    return _class_of(status)(status, name, text)


def _class_of(status: int) -> type[CompactAttnError]:
    special = {8: Unsupported, 108: OutOfMemory}
    if status in special:
        return special[status]
    if status < 100:
        return InvalidArgument
    return DeviceError if status < 200 else InternalError
