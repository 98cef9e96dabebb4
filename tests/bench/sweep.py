"""Rows of the prefill sweep: which there are, in what order they matter, and what is left when time is up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shapes import Shape

# Every ratio is against these two: in place in a server's cache, and as chunked prefill in transformers has it.
PEERS = ("vllm-fa3", "fa2-copies")
# Dense systems have one row, not one a density.
DENSE = (*PEERS, "dense")
# What a shape is measured with before any other method is.
FIRST = (*PEERS, "ours", "dense")


@dataclass(frozen=True)
class Row:
    """One system on one shape."""

    shape: Shape
    # A peer, or a method of methods.py.
    method: str
    # Share of the past it is made to read.
    density: float

    @property
    def system(self) -> str:
        """Its name in tables."""
        if self.method in PEERS:
            return self.method
        if self.method == "dense":
            return "ours-dense"
        return f"{'ours-op' if self.method == 'ours' else self.method}-{self.density:.2f}"

    @property
    def key(self) -> tuple[str, str]:
        """Case and system: what repeats it."""
        return str(self.shape), self.system


@dataclass(frozen=True)
class Sweep:
    """The axes; each in order of importance."""

    # Shapes without chunk and context, such as h32k8_d128_b1.
    families: list[str]
    contexts: list[int]
    chunks: list[int]
    methods: list[str]
    densities: list[float]

    def rows(self) -> list[Row]:
        """All, the most important first: the first chunk and dense rows before the rest, a shape's rows together."""
        shapes = [
            (i, (family, context), Shape.parse(f"{family}_q{chunk}_kv{context}"))
            for i, chunk in enumerate(self.chunks)
            for family in self.families
            for context in self.contexts
            if chunk <= context and context % chunk == 0
        ]
        ranked = []
        for place, (chunk, _, shape) in enumerate(shapes):
            for at, method in enumerate([*PEERS, *self.methods]):
                for density in [1.0] if method in DENSE else self.densities:
                    tier = 2 * (chunk > 0) + (method not in FIRST)
                    ranked.append(((tier, place, at), Row(shape, method, density)))
        ranked.sort(key=lambda it: it[0])
        return [row for _, row in ranked]


def only(rows: Iterable[Row], key: str) -> list[Row]:
    """The row called `CASE,SYSTEM`, and the peers that its ratios need; ValueError if there is none."""
    case, _, system = key.partition(",")
    rows = list(rows)
    if (case, system) not in {row.key for row in rows}:
        raise ValueError(f"no row {key!r} among {len(rows)}, the first of them {','.join(rows[0].key)!r}")
    return [row for row in rows if str(row.shape) == case and row.system in (*PEERS, system)]


@dataclass
class Pace:
    """Guesses what a row will take by rows that were measured, so that time is not overrun by a long one."""

    limit_s: float | None
    _rates: dict[str, float] = field(default_factory=dict)

    def fits(self, row: Row, spent_s: float) -> bool:
        """Whether it should end in time; a system nobody has measured yet is taken to cost nothing."""
        return self.limit_s is None or spent_s + self._rates.get(row.system, 0.0) * _work(row.shape) <= self.limit_s

    def learn(self, row: Row, seconds: float) -> None:
        """What a row took, everything in it."""
        self._rates[row.system] = seconds / _work(row.shape)


def _work(shape: Shape) -> float:
    """In proportion to a dense prefill's time: projections as if they were 8K of context."""
    return float(shape.batch * shape.num_q_heads * shape.context * (shape.context + 16384))
