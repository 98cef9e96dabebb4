"""Chunked-prefill attention that reads only the KV pages that matter, in place in the engine's paged cache.

    batch -> plan -> select -> union -> table -> attend -> combine -> out, lse

``compactattn.forward`` is the short way; Plan, Batch and the stage functions are what engines build on. Importing
loads no native library, touches no driver and needs neither NumPy nor torch.
"""

from __future__ import annotations

from ._library import load as load_library
from ._library import text_of as _text_of
from ._stats import Stats
from .api import forward, plan_for, stats, tables
from .arrays import Array
from .batch import Batch
from .context import Context
from .errors import (
    CompactAttnError,
    DeviceError,
    InternalError,
    InvalidArgument,
    LibraryError,
    OutOfMemory,
    Unsupported,
)
from .means import BlockMeans
from .plan import Plan, PlanDesc
from .selection import Csr, Lists, Padded, Selection, Summaries, Table
from .settings import Settings
from .stages import (
    attend,
    combine,
    export_csr,
    export_padded,
    select,
    table,
    union,
    update_summaries,
)
from .tensors import bf16, e4m3
from .workspace import Borrowed, Workspace


def version() -> str:
    """The native library's version."""
    number: int = load_library().compactattn_version()
    return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}"


def build_info() -> str:
    """One line on how the native library was built."""
    return _text_of("compactattn_build_info")


__all__ = [
    "Array",
    "Batch",
    "BlockMeans",
    "Borrowed",
    "CompactAttnError",
    "Context",
    "Csr",
    "DeviceError",
    "InternalError",
    "InvalidArgument",
    "LibraryError",
    "Lists",
    "OutOfMemory",
    "Padded",
    "Plan",
    "PlanDesc",
    "Selection",
    "Settings",
    "Stats",
    "Summaries",
    "Table",
    "Unsupported",
    "Workspace",
    "attend",
    "bf16",
    "build_info",
    "combine",
    "e4m3",
    "export_csr",
    "export_padded",
    "forward",
    "load_library",
    "plan_for",
    "select",
    "stats",
    "table",
    "tables",
    "union",
    "update_summaries",
    "version",
]
