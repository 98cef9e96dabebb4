"""The schedule of a small serving engine, drawn from a seed alone: every rank draws the same one, nothing is sent.

Requests come, are prefilled in chunks, decode a little, leave or are aborted on the way; their pages come from one pool
that is nearly always full, in an order shuffled by use. Knows neither torch nor the library.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

MODES = ("dense", "compactattn")


@dataclass(frozen=True)
class Scale:
    """How large a rank's share of the engine is; chunks: query tokens of a step, at least and at most."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    num_pages: int
    max_num_reqs: int
    max_kv_len: int
    chunk: tuple[int, int]
    # Of the settings of mode compactattn; the presets' where empty.
    changes: dict[str, object]
    # Tokens of noise that keys, values and queries are cut from.
    noise: int
    page_size: int = 16

    @property
    def max_total_q(self) -> int:
        """Query tokens of the largest step."""
        return self.chunk[1]

    @property
    def width(self) -> int:
        """Pages of the longest request."""
        return -(-self.max_kv_len // self.page_size)


# Half of 32/8 heads: 512K tokens of KV, 1 GiB a layer.
CUDA = Scale(16, 4, 128, 4, 32768, 16, 131072, (512, 8192), {}, 16384)
# The same in miniature: chunks of several spans, dense below 256 tokens.
CPU = Scale(4, 2, 64, 3, 192, 6, 2048, (8, 320), {"query_span": 128, "dense_below_kv_len": 256}, 2048)


@dataclass
class Request:
    """One request; ``origin`` is where in the noise its tokens begin."""

    prompt: int
    decodes: int
    dies_at: int | None
    # int32.
    pages: array[int]
    origin: int
    written: int = 0

    @property
    def dead(self) -> bool:
        """Aborted before its prompt was read."""
        return self.dies_at is not None and self.written >= self.dies_at

    @property
    def done(self) -> bool:
        """Has all its tokens."""
        return self.written >= self.prompt + self.decodes


@dataclass(frozen=True)
class Chunk:
    """Tokens ``first..end`` of a request, whose queries begin at row ``row`` of q."""

    request: Request
    first: int
    end: int
    row: int

    @property
    def count(self) -> int:
        """Query tokens."""
        return self.end - self.first


@dataclass(frozen=True)
class Step:
    """What one step does."""

    mode: str
    # Pages whose owner has left: nobody's, until a chunk is written there.
    freed: list[int]
    chunks: list[Chunk]
    # What is judged if this step is: a chunk, a layer, tokens of the chunk.
    judged: tuple[Chunk, int, list[int]]

    @property
    def total_q(self) -> int:
        """Query tokens."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass
class Told:
    """What happened so far."""

    admitted: int = 0
    finished: int = 0
    aborted: int = 0
    decode_rows: int = 0
    mode_changes: int = 0
    # Pages in use at the fullest; in use, summed over steps; handed out in all.
    fullest: int = 0
    used: int = 0
    handed_out: int = 0


@dataclass
class Schedule:
    """The engine."""

    seed: int
    scale: Scale
    told: Told = field(default_factory=Told)
    mode: str = MODES[1]

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._free = list(range(self.scale.num_pages))
        self._rng.shuffle(self._free)
        self._running: list[Request] = []

    def step(self) -> Step:
        """The next one."""
        if self._rng.random() < 1 / 8:
            mode = self._rng.choice(MODES)
            self.told.mode_changes += mode != self.mode
            self.mode = mode
        freed = self._leave()
        self._admit()
        chunks = self._advance()
        # The longest, as a decode row of a short request says little; and any, as not only the longest must be right.
        chunk = self._rng.choice([max(chunks, key=lambda c: c.end), self._rng.choice(chunks)])
        tokens = sorted({0, chunk.count - 1, self._rng.randrange(chunk.count), self._rng.randrange(chunk.count)})
        self.told.used += self.scale.num_pages - len(self._free)
        return Step(self.mode, freed, chunks, (chunk, self._rng.randrange(self.scale.num_layers), tokens))

    def _leave(self) -> list[int]:
        stay: list[Request] = []
        freed: list[int] = []
        for request in self._running:
            if not (request.dead or request.done):
                stay.append(request)
                continue
            self.told.aborted += request.dead
            self.told.finished += not request.dead
            freed += request.pages
        self._running = stay
        self._free += freed
        if freed:
            self._rng.shuffle(self._free)
        return freed

    def _admit(self) -> None:
        """Requests of any length while there is room; every other one takes what is left, so that the pool is full."""
        page, most = self.scale.page_size, self.scale.max_kv_len - MARGIN
        while len(self._running) < self.scale.max_num_reqs:
            room = min(len(self._free) * page - MARGIN, most)
            drawn = int(most * 2 ** -self._rng.uniform(0, 6))
            prompt = room if self._rng.random() < 1 / 2 else drawn
            if room < 1 or prompt > room:
                if self._running:
                    break
                continue
            pages = -(-(prompt + MARGIN) // page)
            dies_at = self._rng.randint(1, prompt) if self._rng.random() < ABORTED else None
            origin = self._rng.randrange(self.scale.noise // RUN) * RUN
            taken, self._free = self._free[-pages:], self._free[:-pages]
            self._running.append(Request(prompt, self._rng.randrange(MARGIN), dies_at, array("i", taken), origin))
            self.told.admitted += 1
            self.told.handed_out += pages
        self.told.fullest = max(self.told.fullest, self.scale.num_pages - len(self._free))

    def _advance(self) -> list[Chunk]:
        budget, row, chunks = self._rng.randint(*self.scale.chunk), 0, []
        for request in self._rng.sample(self._running, len(self._running)):
            left = request.prompt - request.written
            count = min(left, budget) if left > 0 else 1
            if not 0 < count <= budget:
                continue
            self.told.decode_rows += left <= 0
            chunks.append(Chunk(request, request.written, request.written + count, row))
            request.written += count
            row, budget = row + count, budget - count
        return chunks


# Tokens kept free behind every prompt: more than a request decodes.
MARGIN = 24
ABORTED = 0.3
# Tokens of noise that are alike: a block of the presets.
RUN = 32
# What spoils rank 1 on purpose, to see the run fail: another key in the layer that is alike; outputs off by a tenth
# where ranks have their own data; a sum that is off; two pages in each other's place in block tables; a layer that runs
# twice; no more steps; a file a step left open; a plan and 4 MiB a step kept.
SPOILS = ("keys", "answer", "sum", "table", "twice", "stall", "files", "memory")
