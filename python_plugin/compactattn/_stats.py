"""Stats: what forward calls have selected."""

from __future__ import annotations

from dataclasses import dataclass

from . import _abi_step


@dataclass(frozen=True)
class Stats:
    """What forward calls have selected since the plan was made; fields as in ``compactattn_stats``."""

    calls: int = 0
    lists: int = 0
    candidates: int = 0
    selected: int = 0
    forced: int = 0
    guarded: int = 0
    dense: int = 0
    refused: int = 0

    @property
    def density(self) -> float | None:
        """Share of past blocks that sparse lists read; None before the first one."""
        return self.selected / self.candidates if self.candidates else None

    def __add__(self, other: Stats) -> Stats:
        return Stats(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @classmethod
    def from_c(cls, struct: _abi_step.Stats) -> Stats:
        """The fields of a C struct."""
        return cls(**{name: getattr(struct, name) for name in cls.__dataclass_fields__})
