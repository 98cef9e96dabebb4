"""Finds, loads and calls the native library; the only place that holds a function pointer."""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

from . import _abi, _abi_step
from .errors import E_ABI, E_IO, LibraryError, of_status


def load(path: str | os.PathLike[str] | None = None) -> ctypes.CDLL:
    """Loads the library, once a process; ``path`` (for developers) replaces the one in the package.

    Raises LibraryError if it is missing, made for another ABI, or if another file is loaded already.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _open(Path(path) if path is not None else PACKAGED)
        elif path is not None and Path(_loaded._name) != Path(path):
            raise LibraryError(E_IO, "E_IO", f"E_IO: library: {_loaded._name} is loaded already")
        return _loaded


def call(name: str, *args: Any) -> None:
    """Calls a function that returns a status; raises unless that is OK. The GIL is released meanwhile."""
    library = _loaded or load()
    status = getattr(library, name)(*args)
    if status:
        raise of_status(status, status_name(status), text_of("compactattn_last_error"))


def status_name(status: int) -> str:
    """The stable name of a status: ``E_SHAPE``."""
    name: bytes = load().compactattn_status_string(status)
    return name.decode()


def text_of(name: str) -> str:
    """The text that a copy-out function holds."""
    function = getattr(load(), name)
    buffer = ctypes.create_string_buffer(function(None, 0) + 1)
    function(buffer, len(buffer))
    return buffer.value.decode()


def _open(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        text = f"E_IO: library: {path} is missing; install the package (pip install .)"
        raise LibraryError(E_IO, "E_IO", text)
    try:
        # RTLD_LOCAL: symbols stay ours whatever else the process holds.
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        for name, (restype, argtypes) in _functions().items():
            function = getattr(library, name)
            function.restype, function.argtypes = restype, argtypes
    except (OSError, AttributeError) as error:
        raise LibraryError(E_IO, "E_IO", f"E_IO: library: {error}") from error
    abi = library.compactattn_abi_version()
    if abi != _abi.ABI_VERSION:
        text = f"E_ABI: library: wanted ABI {_abi.ABI_VERSION}, got {abi} ({path}); reinstall the package"
        raise LibraryError(E_ABI, "E_ABI", text)
    return library


def _functions() -> dict[str, tuple[Any, list[Any]]]:
    statuses: dict[str, tuple[Any, list[Any]]] = {
        f"compactattn_{name}": (c_int32, argtypes) for name, argtypes in _STATUS_FUNCTIONS.items()
    }
    return statuses | {
        "compactattn_abi_version": (c_uint32, []),
        "compactattn_version": (c_uint32, []),
        "compactattn_status_string": (c_char_p, [c_int32]),
        "compactattn_last_error": (c_size_t, [c_char_p, c_size_t]),
        "compactattn_build_info": (c_size_t, [c_char_p, c_size_t]),
    }


_HANDLE = c_void_p
_STEP = [_HANDLE, c_int32, POINTER(_abi_step.Batch)]
_STATUS_FUNCTIONS: dict[str, list[Any]] = {
    "context_create": [POINTER(_abi.ContextDesc), POINTER(_HANDLE)],
    "context_destroy": [_HANDLE],
    "settings_init": [c_int32, POINTER(_abi.Settings)],
    "settings_from_mode": [c_int32, POINTER(_abi.Settings)],
    "settings_from_env": [c_int32, POINTER(_abi.Settings)],
    "plan_create": [_HANDLE, POINTER(_abi.PlanDesc), POINTER(_HANDLE)],
    "plan_destroy": [_HANDLE],
    "plan_sizes": [_HANDLE, c_int32, POINTER(_abi.Settings), POINTER(_abi_step.Sizes)],
    "plan_stats": [_HANDLE, c_int32, POINTER(_abi_step.Stats)],
    "summary_bytes": [_HANDLE, c_int32, c_int64, POINTER(c_int64)],
    "supports": [_HANDLE, POINTER(_abi.PlanDesc), c_char_p, c_size_t],
    "summaries_update": [*_STEP, c_int32, POINTER(_abi_step.Summaries)],
    "select": [*_STEP, POINTER(_abi_step.Summaries), POINTER(_abi_step.Selection)],
    "union": [*_STEP, POINTER(_abi_step.Selection), POINTER(_abi.Tensor), POINTER(c_int64)],
    "table_build": [*_STEP, POINTER(_abi.Tensor), POINTER(_abi_step.Table)],
    "table_export_padded": [*_STEP, POINTER(_abi.Tensor), POINTER(_abi_step.Padded)],
    "table_export_csr": [*_STEP, POINTER(_abi.Tensor), POINTER(_abi_step.Csr), POINTER(c_int64)],
    "attend": [_HANDLE, POINTER(_abi_step.AttendArgs)],
    "combine": [_HANDLE, POINTER(_abi_step.CombineArgs)],
    "forward": [_HANDLE, POINTER(_abi_step.ForwardArgs)],
}

PACKAGED = Path(__file__).parent / "libcompactattn.so"

_lock = threading.Lock()
_loaded: ctypes.CDLL | None = None
