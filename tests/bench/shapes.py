"""What is measured: shapes with their names, and the questions that TOML files ask. No framework here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib

# What a system without pages says in the page column.
CONTIGUOUS = 0


@dataclass(frozen=True)
class Shape:
    """The last chunk of each of `batch` equal requests: `chunk` query tokens that end a context of `context` tokens."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int
    chunk: int
    context: int

    @classmethod
    def parse(cls, name: str) -> Shape:
        """From a name such as h32k8_d128_b1_q1024_kv131072; ValueError for another."""
        found = re.fullmatch(r"h(\d+)k(\d+)_d(\d+)_b(\d+)_q(\d+)_kv(\d+)", name)
        if found is None:
            raise ValueError(f"a shape is named like h32k8_d128_b1_q1024_kv131072, not {name!r}")
        shape = cls(*map(int, found.groups()))
        if shape.num_q_heads % shape.num_kv_heads or shape.chunk > shape.context:
            raise ValueError(f"{name}: KV heads divide query heads, and a chunk lies within its context")
        return shape

    def __str__(self) -> str:
        heads = f"h{self.num_q_heads}k{self.num_kv_heads}_d{self.head_dim}"
        return f"{heads}_b{self.batch}_q{self.chunk}_kv{self.context}"

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads

    def flop(self, density: float = 1.0) -> float:
        """4 * Hq * chunk * context * d a request, times the share of the context that is read: no causal discount."""
        return 4.0 * self.batch * self.num_q_heads * self.chunk * self.context * self.head_dim * density

    def kv_bytes(self) -> int:
        """Bytes of K and V, 2 an element."""
        return 4 * self.batch * self.context * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Cell:
    """One shape at one page size and one density: what systems are compared on."""

    shape: Shape
    page_size: int
    # Share of the context that each list reads; 1 = all of it.
    density: float


@dataclass(frozen=True)
class Question:
    """One TOML file of definitions/."""

    name: str
    asks: str
    # random, planted or trace.
    data: str
    # Memory order of the pool: NHD or HND.
    layout: str
    systems: tuple[str, ...]
    cells: tuple[Cell, ...]
    repeats: int
    warmups: int
    # The largest relative error against the answer that a system's own rules give; None = rounding alone.
    max_rel_err: float | None
    # What an approximate system may change: fields of compactattn.Settings.
    settings: dict[str, Any]
    # Blocks of given lists: random, or mass (those that hold most of the softmax's mass).
    lists: str
    # How uneven given lists are: the coefficient of variation of their lengths.
    list_cv: float
    # For data = trace: the file (relative to the repository), and the layer.
    trace: str
    layer: int
    seed: int

    @classmethod
    def load(cls, path: Path) -> Question:
        """Reads a definition; ValueError for a key nobody knows."""
        table = tomllib.loads(path.read_text())
        cases, known = table.pop("cases"), {**_DEFAULTS}
        table.pop("analysis", None)
        name = table.pop("question")
        if unknown := set(table) - set(known) - {"asks", "systems"}:
            raise ValueError(f"{path.name}: unknown keys {sorted(unknown)}")
        fields = known | table
        fields["systems"] = tuple(fields["systems"])
        return cls(name=name, cells=tuple(_cells(cases)), **fields)


def _cells(cases: list[dict[str, Any]]) -> Iterator[Cell]:
    for case in cases:
        for page_size in case.get("pages", [16]):
            for density in case.get("densities", [1.0]):
                yield Cell(Shape.parse(case["shape"]), page_size, density)


_DEFAULTS: dict[str, Any] = {
    "data": "random",
    "layout": "NHD",
    "repeats": 12,
    "warmups": 3,
    "max_rel_err": None,
    "settings": {},
    "lists": "random",
    "list_cv": 0.0,
    "trace": "",
    "layer": 0,
    "seed": 0,
}
