"""Rows of the prefill sweep: which there are, in what order they matter, and what is left when time is up."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

from shapes import Shape

# Every ratio is against these two: in place in a server's cache, and as chunked prefill in transformers has it.
PEERS = ("vllm-fa3", "fa2-copies")
# Dense systems have one row, not one a density.
DENSE = (*PEERS, "dense")
# Names of tables that are not the method's.
OURS = {"ours-op": "ours"}
# What a shape is measured with before any other method is; how many contexts further down others are, and chunks.
FIRST = (*PEERS, "ours", "dense")
OTHER_METHOD, OTHER_CHUNK = 3, 4


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
        return f"{next((name for name, it in OURS.items() if it == self.method), self.method)}-{self.density:.2f}"

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
        """All, the most important first: each step down an axis costs rank, another method or chunk most."""
        ranked: list[tuple[tuple[int, ...], Row]] = []
        axes = product(enumerate(self.chunks), enumerate(self.families), enumerate(self.contexts))
        for (chunk_at, chunk), (family_at, family), (context_at, context) in axes:
            if context % chunk:
                continue
            shape = Shape.parse(f"{family}_q{chunk}_kv{context}")
            place = (chunk_at, family_at, context_at)
            for at, method in enumerate([*PEERS, *self.methods]):
                for step, density in enumerate([1.0] if method in DENSE else self.densities):
                    other = 0 if method in FIRST else OTHER_METHOD + step
                    rank = context_at + other + (OTHER_CHUNK if chunk_at else 0)
                    ranked.append(((rank, *place, at), Row(shape, method, density)))
        ranked.sort(key=lambda it: it[0])
        return [row for _, row in ranked]


def repeated(key: str) -> list[Row]:
    """The row called `CASE,SYSTEM`, after the peers that its ratios need; ValueError for what no row is called."""
    case, _, system = key.partition(",")
    shape = Shape.parse(case)
    named, _, share = system.rpartition("-")
    try:
        row = Row(shape, "dense", 1.0) if system == "ours-dense" else Row(shape, OURS.get(named, named), float(share))
    except ValueError:
        raise ValueError(f"a row is called like {case},ours-op-0.17, not {key!r}") from None
    return [*(Row(shape, peer, 1.0) for peer in PEERS), row]


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
