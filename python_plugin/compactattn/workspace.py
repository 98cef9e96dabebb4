"""Scratch memory of a call: contents mean nothing before and after."""

from __future__ import annotations

import math
import threading
from typing import Any, Protocol

from .arrays import ITEM_BYTES, Memory
from .tensors import view


class Scratch(Protocol):
    """Anything with an address, aligned to 256 bytes, on the context's device, and a length."""

    @property
    def address(self) -> int:
        """The first byte."""

    @property
    def num_bytes(self) -> int:
        """How many there are."""


class Workspace(Memory):
    """CPU scratch memory; one call at a time may use it."""


class Borrowed:
    """Scratch memory within a contiguous tensor of the caller's, on any device: one call at a time may use it."""

    def __init__(self, tensor: Any) -> None:
        self._view = view("workspace", tensor, writable=True)
        self.address: int = self._view.tensor.data or 0
        self.num_bytes = math.prod(self._view.shape) * ITEM_BYTES[self._view.dtype]


def of_thread(num_bytes: int) -> Workspace:
    """The workspace of this thread, grown to ``num_bytes``; freed with the thread."""
    found: Workspace | None = getattr(_local, "workspace", None)
    if found is None or found.num_bytes < num_bytes:
        # The old one goes first, so that both are never held.
        _local.workspace = None
        found = _local.workspace = Workspace(num_bytes)
    return found


_local = threading.local()
