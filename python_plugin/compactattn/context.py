"""Context: one device, and the threads that one call may use."""

from __future__ import annotations

import ctypes
import os
import weakref

from . import _abi
from ._library import call, load
from .errors import E_VALUE, invalid
from .settings import int32


class Context:
    """One device. Threads may share it; it is freed with its last reference, plans live on.

    ``device``: ``cpu``, ``cuda`` or ``cuda:N``. ``num_threads``: CPU threads of one call; 0 = the cores this process
    may use. Raises DeviceError where the device cannot be served.
    """

    def __init__(self, device: str = "cpu", num_threads: int = 0) -> None:
        kind, ordinal = _device(device)
        desc = _abi.ContextDesc(
            abi_version=_abi.ABI_VERSION,
            device_kind=kind,
            device_ordinal=ordinal,
            num_threads=int32("num_threads", num_threads),
        )
        handle = ctypes.c_void_p()
        call("compactattn_context_create", ctypes.byref(desc), ctypes.byref(handle))
        self.device = device
        self.handle = handle.value
        free_with(self, "compactattn_context_destroy", self.handle)


def of(device: str) -> Context:
    """The context of this process for a device (``cpu``, ``cuda:N``), made on first use and kept."""
    found = _contexts.get(device)
    if found is None:
        # Two threads may both make one; the loser's is freed.
        found = _contexts.setdefault(device, Context(device))
    return found


def default() -> Context:
    """The CPU context of this process."""
    return of("cpu")


def free_with(owner: object, function: str, handle: int | None) -> None:
    """Frees the handle with its owner. What lives to the end of the process ends with it: hooks may still read it."""
    # A property, which the stubs of types leave out.
    weakref.finalize(owner, _destroy, function, handle).atexit = False  # type: ignore[misc]


def _destroy(function: str, handle: int | None) -> None:
    # A forked child holds its parent's, which the library refuses to free: nothing is lost.
    getattr(load(), function)(handle)


def _device(text: str) -> tuple[_abi.DeviceKind, int]:
    kind, _, ordinal = text.partition(":")
    if kind == "cpu" and not ordinal:
        return _abi.DeviceKind.CPU, 0
    if kind == "cuda" and (not ordinal or ordinal.isdecimal()):
        return _abi.DeviceKind.CUDA, int32("device", int(ordinal or 0))
    raise invalid(E_VALUE, "device", "cpu, cuda or cuda:N", repr(text))


def _forget() -> None:
    _contexts.clear()


_contexts: dict[str, Context] = {}
os.register_at_fork(after_in_child=_forget)
