"""What to keep and how far to share it: one Settings per layer, explicit everywhere."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from . import _abi
from ._library import call
from .errors import E_VALUE, invalid

_E = TypeVar("_E", bound=IntEnum)


@dataclass(frozen=True)
class Settings:
    """Everything that steers selection in one layer; fields as in ``compactattn_settings``, enums by name.

    Start from :meth:`mode`, :meth:`of` or :meth:`from_env` and change fields with :meth:`replace`.
    """

    # Who scores: dense, sampled_exact, flashprefill, pooled_mass, two_level, attn_gate, quoka, xattention, ...
    selector: str
    # Tokens per block: 16, 32, 64, 128 or 256; 1 for quoka.
    block_size: int
    # Query tokens per list: 128, 256, 512, 1024 or 2048; 0 = the whole chunk.
    query_span: int
    # Query heads per list within a KV group; 0 = the whole group.
    heads_per_list: int
    # Which blocks of a row stay: threshold, mass or density; and its number, in (0, 1].
    keep: str
    keep_value: float
    # Where that is decided: row or list.
    keep_at: str
    # Floor and cap of the share of past blocks a list keeps.
    min_density: float
    max_density: float
    # First, and last past, blocks always kept.
    sink_blocks: int
    local_blocks: int
    # A list that keeps more than this share of its past blocks becomes dense; 1 = never.
    density_guard: float
    # Means of 512 tokens stand in for what is skipped of them.
    mean_correction: bool
    # Dense below so many KV tokens, for chunks of at most so many tokens, and within the first so many.
    dense_below_kv_len: int
    dense_max_q_len: int
    dense_prefix_tokens: int
    # Query rows per span and head that sampled_exact, pooled_mass and two_level score; 0 = all.
    sample_rows: int
    flashprefill_non_voting_spans: int
    flashprefill_min_budget: int
    flashprefill_relative_to_past: bool
    # Share of a chunk's queries that score, in (0, 1].
    quoka_query_ratio: float
    # Tokens per antidiagonal sample; divides block_size.
    xattention_stride: int
    # Re-score this many times the budget; at least 1.
    two_level_factor: float

    @classmethod
    def mode(cls, name: str) -> Settings:
        """A preset: ``dense``, ``compactattn``, ``block_sparse`` or ``paper``."""
        mode = _member("mode", _abi.Mode, name)
        return _preset("compactattn_settings_from_mode", mode)

    @classmethod
    def of(cls, selector: str) -> Settings:
        """What a selector is published (or, for ours, measured) with."""
        number = _member("settings.selector", _abi.Selector, selector)
        return _preset("compactattn_settings_init", number)

    @classmethod
    def from_env(cls, layer: int = -1) -> Settings:
        """What ``COMPACTATTN_MODE`` and ``COMPACTATTN_CONFIG`` ask for in one layer; -1 = any that is not named."""
        return _filled("compactattn_settings_from_env", int32("layer", layer))

    def replace(self, **changes: object) -> Settings:
        """A copy with some fields changed; TypeError for a field that does not exist."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_c(self) -> _abi.Settings:
        """The C struct. Ranges are the library's to check, but for what C's types cannot hold."""
        struct = _abi.Settings()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _ENUMS:
                value = _member(f"settings.{field.name}", _ENUMS[field.name], value)
            elif field.type == "float":
                value = _number(f"settings.{field.name}", value)
            else:
                value = int32(f"settings.{field.name}", value)
            setattr(struct, field.name, value)
        return struct

    @classmethod
    def from_c(cls, struct: _abi.Settings) -> Settings:
        """The fields of a C struct."""
        values: dict[str, object] = {}
        for field in dataclasses.fields(cls):
            value = getattr(struct, field.name)
            if field.name in _ENUMS:
                value = _ENUMS[field.name](value).name.lower()
            elif field.type == "float":
                value = _shortest(value)
            values[field.name] = bool(value) if field.type == "bool" else value
        return cls(**values)  # type: ignore[arg-type]


def _filled(function: str, argument: int) -> Settings:
    struct = _abi.Settings()
    call(function, argument, ctypes.byref(struct))
    return Settings.from_c(struct)


# Presets never change; the environment may.
_preset = functools.lru_cache(maxsize=None)(_filled)


def int32(name: str, value: object) -> int:
    """``value`` if it is a whole number that C's int32_t holds (ctypes would cut it silently)."""
    return whole(name, value, 31)


def whole(name: str, value: object, bits: int) -> int:
    """``value`` if it is a whole number of at most ``bits`` bits and a sign."""
    number = value.__index__() if hasattr(value, "__index__") else None
    if number is None or not -(1 << bits) <= number < 1 << bits:
        raise invalid(E_VALUE, name, f"a whole number of {bits} bits", value)
    return int(number)


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)):
        raise invalid(E_VALUE, name, "a number", type(value).__name__)
    return float(value)


def _shortest(value: float) -> float:
    """The number with the fewest digits that is the same in C's float: 0.97, not 0.9700000286102295."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 9))
    return next((float(x) for x in texts if ctypes.c_float(float(x)).value == value), value)


def _member(argument: str, enum: type[_E], name: object) -> _E:
    found = enum.__members__.get(name.upper()) if isinstance(name, str) else None
    if found is None:
        raise invalid(E_VALUE, argument, "|".join(member.name.lower() for member in enum), repr(name))
    return found


_ENUMS: dict[str, type[IntEnum]] = {
    "selector": _abi.Selector,
    "keep": _abi.Keep,
    "keep_at": _abi.KeepAt,
}
